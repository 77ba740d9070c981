package render

import (
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
)

func TestDescribe(t *testing.T) {
	ip := func(proto byte, l4 []byte) events.Packet {
		return pkt4(v4{ttl: 64, proto: proto, src: c2, dst: c1, l4: l4}.bytes())
	}
	ipv6 := func(next byte, rest []byte) events.Packet {
		return pkt6(v6{first: "60000000", next: next, hop: 64, src: g1, dst: g2, rest: rest}.bytes())
	}
	arp := func(b []byte) events.Packet { return events.Packet{EtherType: 0x0806, Len: len(b), Data: b} }
	inner := v4{id: 7, ttl: 63, proto: 6, src: c1, dst: c2, l4: tcpSYN[:8]}.bytes()
	inner6 := v6{first: "60000000", next: 17, hop: 63, src: g2, dst: g1, rest: udp53}.bytes()
	frag := func(off uint16) events.Packet {
		return pkt4(v4{ttl: 64, frag: off, proto: 17, src: c2, dst: c1, l4: udp53}.bytes())
	}

	for _, tc := range []struct {
		name string
		p    events.Packet
		want string
	}{
		{"syn", ip(6, synBytes), "TCP 172.17.0.3:40000 → 172.17.0.2:12345 [SYN]"},
		{"syn ack", ip(6, raw("0050 9c40 00000000 00000000 50 12 0000 0000 0000")), "TCP 172.17.0.3:80 → 172.17.0.2:40000 [SYN,ACK]"},
		{"fin", ip(6, raw("0050 9c40 00000000 00000000 50 19 0000 0000 0000")), "TCP 172.17.0.3:80 → 172.17.0.2:40000 [ACK,FIN,PSH]"},
		{"null scan", ip(6, raw("0050 9c40 00000000 00000000 50 00 0000 0000 0000")), "TCP 172.17.0.3:80 → 172.17.0.2:40000 [no flags]"},
		{"udp", ip(17, udp53), "UDP 172.17.0.3:35559 → 172.17.0.2:53"},
		{"udp6", ipv6(17, udp53), "UDP [2001:db8::1]:35559 → [fe80::42:acff:fe11:2]:53"},
		{"tcp6 behind hop-by-hop", ipv6(0, append(raw("0600 01040000 0000"), synBytes...)), "TCP [2001:db8::1]:40000 → [fe80::42:acff:fe11:2]:12345 [SYN]"},
		{"echo", pkt4(echo4.bytes()), "ICMP 172.17.0.3 → 172.17.0.2 echo request id 5 seq 1"},
		{"echo reply", ip(1, raw("0000 0000 0005 0001")), "ICMP 172.17.0.3 → 172.17.0.2 echo reply id 5 seq 1"},
		{"port unreachable", ip(1, append(raw("0303 0000 00000000"), inner...)), "ICMP 172.17.0.3 → 172.17.0.2 port unreachable (for TCP 172.17.0.2:40000 → 172.17.0.3:12345)"},
		{"frag needed", ip(1, append(raw("0304 0000 0000 05dc"), inner...)), "ICMP 172.17.0.3 → 172.17.0.2 fragmentation needed, mtu 1500 (for TCP 172.17.0.2:40000 → 172.17.0.3:12345)"},
		{"ttl exceeded", ip(1, raw("0b00 0000 00000000")), "ICMP 172.17.0.3 → 172.17.0.2 ttl exceeded"},
		{"icmp type", ip(1, raw("2a05 0000 00000000")), "ICMP 172.17.0.3 → 172.17.0.2 type 42 code 5"},
		{"echo6", ipv6(58, raw("8100 0000 0005 0001")), "ICMPv6 2001:db8::1 → fe80::42:acff:fe11:2 echo reply id 5 seq 1"},
		{"too big", ipv6(58, append(raw("0200 0000 00000500"), inner6...)), "ICMPv6 2001:db8::1 → fe80::42:acff:fe11:2 packet too big, mtu 1280 (for UDP [fe80::42:acff:fe11:2]:35559 → [2001:db8::1]:53)"},
		{"ns", ipv6(58, raw("8700 0000 00000000", "fe800000000000000042acfffe110002")), "ICMPv6 2001:db8::1 → fe80::42:acff:fe11:2 neighbour solicitation for fe80::42:acff:fe11:2"},
		{"first fragment", frag(0x2000), "UDP 172.17.0.3:35559 → 172.17.0.2:53 first fragment"},
		{"fragment", frag(185), "UDP 172.17.0.3 → 172.17.0.2 fragment at offset 1480"},
		{"fragment6", ipv6(44, append(raw("1100 05a8 0000beef"), udp53...)), "UDP 2001:db8::1 → fe80::42:acff:fe11:2 fragment at offset 1448"},
		{"first fragment6", ipv6(44, append(raw("1100 0001 0000beef"), udp53...)), "UDP [2001:db8::1]:35559 → [fe80::42:acff:fe11:2]:53 first fragment"},
		{"atomic fragment6", ipv6(44, append(raw("1100 0000 0000beef"), udp53...)), "UDP [2001:db8::1]:35559 → [fe80::42:acff:fe11:2]:53"},
		{"sctp", ip(132, raw("0050 0051 00000000")), "SCTP 172.17.0.3:80 → 172.17.0.2:81"},
		{"gre", ip(47, nil), "GRE 172.17.0.3 → 172.17.0.2"},
		{"esp", ip(50, raw("f1234567")), "ESP 172.17.0.3 → 172.17.0.2 spi 0xf1234567"},
		{"unknown", ip(253, nil), "protocol 253 172.17.0.3 → 172.17.0.2"},
		{"cut short", ip(17, raw("0000")), "UDP 172.17.0.3 → 172.17.0.2 (header cut short)"},
		{"not captured", with(ip(17, udp53), func(p *events.Packet) { p.Data = p.Data[:20] }), "UDP 172.17.0.3 → 172.17.0.2 (header not captured)"},
		{"nothing captured", with(ip(17, udp53), func(p *events.Packet) { p.Data = nil }), "IPv4 packet (header not captured)"},
		{"zero", events.Packet{}, "unknown packet"},
		{"who-has", arp(raw("0001 0800 06 04 0001 0242ac110003 ac110003 000000000000 ac110002")), "ARP who-has 172.17.0.2 tell 172.17.0.3"},
		{"is-at", arp(raw("0001 0800 06 04 0002 0242ac110002 ac110002 0242ac110003 ac110003")), "ARP 172.17.0.2 is-at 02:42:ac:11:00:02"},
		{"announcement", arp(raw("0001 0800 06 04 0001 0242ac110002 ac110002 000000000000 ac110002")), "ARP announces 172.17.0.2 at 02:42:ac:11:00:02"},
		{"rarp", with(arp(raw("0001 0800 06 04 0003 0242ac110003 ac110003 0242ac110003 00000000")), func(p *events.Packet) { p.EtherType = 0x8035 }),
			"RARP operation 3 from 172.17.0.3 to 0.0.0.0"},
		{"rarp with an operation of ARP's", with(arp(raw("0001 0800 06 04 0001 0242ac110003 ac110003 000000000000 ac110002")), func(p *events.Packet) { p.EtherType = 0x8035 }),
			"RARP operation 1 from 172.17.0.3 to 172.17.0.2"},
		{"lldp", events.Packet{EtherType: 0x88cc, Len: 60}, "LLDP (ethertype 0x88cc)"},
		{"stp", events.Packet{EtherType: 4, Len: 60}, "802.2 frame (protocol 0x0004)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Describe(&tc.p); got != tc.want {
				t.Errorf("\n got %q\nwant %q", got, tc.want)
			}
		})
	}
}

// In JSON, what is whole is no fragment, whatever headers it has.
func TestFragOff(t *testing.T) {
	for header, want := range map[string]int{"1100 0000 0000beef": -1, "1100 0001 0000beef": 0, "1100 05a8 0000beef": 1448} {
		p := pkt6(v6{first: "60000000", next: 44, hop: 64, src: g1, dst: g2, rest: append(raw(header), udp53...)}.bytes())
		got := packetObject(&p).FragOff
		if got == nil && want >= 0 || got != nil && *got != want {
			t.Errorf("%s: %v, want %d", header, got, want)
		}
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add(uint8(events.PFIPv4), uint16(0x0800), 84, echo4.bytes())
	f.Add(uint8(events.PFIPv6), uint16(0x86dd), 60, v6{first: "60000000", next: 44, src: g1, dst: g2, rest: raw("1100 0001 deadbeef")}.bytes())
	f.Add(uint8(0), uint16(0x0806), 28, raw("0001 0800 06 04 0001 0242ac110003 ac110003 000000000000 ac110002"))
	f.Fuzz(func(t *testing.T, family uint8, etherType uint16, length int, data []byte) {
		p := events.Packet{Family: family, EtherType: etherType, Len: length, Data: data}
		got := Describe(&p)
		checkLine(t, got)
		if got == "" || len(got) > 400 || strings.TrimSpace(got) != got {
			t.Errorf("%q", got)
		}
		if got != Describe(&p) {
			t.Error("not the same twice")
		}
		h := parseHead(&p)
		if h.ip && (!h.src.IsValid() || !h.dst.IsValid()) {
			t.Error("no addresses")
		}
		if h.fragOff > 0 && h.l4 != nil {
			t.Error("a later fragment has no transport header")
		}
		if len(h.l4) > len(data) || len(h.l4) > max(length, 0) {
			t.Error("transport header outside the packet")
		}
	})
}
