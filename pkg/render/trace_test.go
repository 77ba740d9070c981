package render

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/nftrace/nftrace/pkg/events"
)

func traceStep(pf uint8, p events.Packet) events.Step {
	return events.Step{
		Place: &events.Place{PF: pf, Hook: events.HookForward}, Kind: events.StepTable, Verdict: events.NFAccept,
		Table: &events.TableRun{
			Name: "filter", Before: &p, Met: []events.Met{{Pkt: &p}},
			Rules: []events.Rule{{Chain: "FORWARD", Type: events.TypeRule, Num: 1, Text: "-j ACCEPT", Action: "ACCEPT"}},
		},
	}
}

func traceString(t testing.TB, steps ...events.Step) string {
	t.Helper()
	var b bytes.Buffer
	if err := Trace(&b, &events.Journey{Steps: steps}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The expected texts are nf_log_syslog.c's formats, applied by hand.
func TestTracePackets(t *testing.T) {
	hdr4 := "SRC=172.17.0.3 DST=172.17.0.2 "
	hdr6 := "SRC=2001:0db8:0000:0000:0000:0000:0000:0001 DST=fe80:0000:0000:0000:0042:acff:fe11:0002 "
	ip4With := func(proto byte, l4 []byte, f func(*v4)) []byte {
		h := v4{id: 123, frag: 0x4000, ttl: 64, proto: proto, src: c2, dst: c1, l4: l4}
		if f != nil {
			f(&h)
		}
		return h.bytes()
	}
	ip6With := func(next byte, rest []byte) []byte {
		return v6{first: "60000000", next: next, hop: 64, src: g1, dst: g2, rest: rest}.bytes()
	}
	// The packet of an ICMP error: a UDP packet 172.17.0.2:53 → 172.17.0.3:35559 with its first 8 bytes.
	inner := v4{id: 7, ttl: 63, proto: 17, src: c1, dst: c2, l4: raw("0035 8ae7 0010 0000")}.bytes()
	innerText := "SRC=172.17.0.2 DST=172.17.0.3 LEN=28 TOS=0x00 PREC=0x00 TTL=63 ID=7 PROTO=UDP SPT=53 DPT=35559 LEN=16 "

	for _, tc := range []struct {
		name string
		data []byte
		mod  func(*events.Packet)
		want string // after "IN= OUT= "
	}{
		{"icmp echo", echo4.bytes(), nil,
			hdr4 + "LEN=84 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=8 CODE=0 ID=5 SEQ=1 "},
		{"tcp syn with options", ip4With(6, synBytes, nil), nil,
			hdr4 + "LEN=60 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=40000 DPT=12345 SEQ=1234567890 ACK=0 WINDOW=64240 RES=0x00 SYN URGP=0 OPT (020405B40402080A000186A00000000001030307) "},
		{"tcp all flags, reserved bits, no options", ip4With(6, raw("0001 0002 ffffffff 00000001 5f ff 0010 0000 0003"), nil), nil,
			hdr4 + "LEN=40 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=1 DPT=2 SEQ=4294967295 ACK=1 WINDOW=16 RES=0x3c CWR ECE URG ACK PSH RST SYN FIN URGP=3 "},
		{"tcp, data offset beyond the packet", ip4With(6, raw("0001 0002 00000000 00000000 f0 02 0010 0000 0000 0101"), nil), nil,
			hdr4 + "LEN=42 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=1 DPT=2 SEQ=0 ACK=0 WINDOW=16 RES=0x00 SYN URGP=0 OPT (TRUNCATED)"},
		{"tcp, data offset too small", ip4With(6, raw("0001 0002 00000000 00000000 00 10 0010 0000 0000"), nil), nil,
			hdr4 + "LEN=40 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=1 DPT=2 SEQ=0 ACK=0 WINDOW=16 RES=0x00 ACK URGP=0 "},
		{"tcp incomplete: no owner, no mark after it", ip4With(6, raw("0001 0002 0000"), nil), func(p *events.Packet) { p.Mark = 1; p.HasOwner = true },
			hdr4 + "LEN=26 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP INCOMPLETE [6 bytes] "},
		{"udp with owner and mark", ip4With(17, udp53, nil), func(p *events.Packet) { p.HasOwner, p.UID, p.GID, p.Mark = true, 1000, 100, 0xbeef },
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=UDP SPT=35559 DPT=53 LEN=16 UID=1000 GID=100 MARK=0xbeef "},
		{"owner root", ip4With(17, udp53, nil), func(p *events.Packet) { p.HasOwner = true },
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=UDP SPT=35559 DPT=53 LEN=16 UID=0 GID=0 "},
		{"udplite", ip4With(136, udp53, nil), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=UDPLITE SPT=35559 DPT=53 LEN=16 "},
		{"udp incomplete", ip4With(17, raw("8ae7"), nil), nil,
			hdr4 + "LEN=22 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=UDP INCOMPLETE [2 bytes] "},
		{"tos and precedence, low bit dropped", ip4With(17, udp53, func(h *v4) { h.tos = 0xb9; h.frag = 0 }), nil,
			hdr4 + "LEN=36 TOS=0x18 PREC=0xA0 TTL=64 ID=123 PROTO=UDP SPT=35559 DPT=53 LEN=16 "},
		{"first fragment", ip4With(17, udp53, func(h *v4) { h.frag = 0x2000 }), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 MF PROTO=UDP SPT=35559 DPT=53 LEN=16 "},
		{"later fragment, CE DF MF", ip4With(17, udp53, func(h *v4) { h.frag = 0xe0b9 }), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 CE DF MF FRAG:185 PROTO=UDP "},
		{"later fragment of tcp keeps the mark", ip4With(6, udp53, func(h *v4) { h.frag = 185 }), func(p *events.Packet) { p.Mark = 2 },
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 FRAG:185 PROTO=TCP MARK=0x2 "},
		{"later fragment of icmp", ip4With(1, udp53, func(h *v4) { h.frag = 185 }), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 FRAG:185 PROTO=ICMP "},
		{"later fragment of ah has no PROTO", ip4With(51, udp53, func(h *v4) { h.frag = 185 }), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 FRAG:185 "},
		{"later fragment of esp", ip4With(50, udp53, func(h *v4) { h.frag = 185 }), nil,
			hdr4 + "LEN=36 TOS=0x00 PREC=0x00 TTL=64 ID=123 FRAG:185 PROTO=ESP "},
		{"ip options", ip4With(1, echo, func(h *v4) { h.opts = raw("94040000") }), nil,
			hdr4 + "LEN=88 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF OPT (94040000) PROTO=ICMP TYPE=8 CODE=0 ID=5 SEQ=1 "},
		{"icmp incomplete", ip4With(1, raw("0800 f7ff"), nil), nil,
			hdr4 + "LEN=24 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP INCOMPLETE [4 bytes] "},
		{"icmp timestamp too short", ip4With(1, raw("0d00 0000 0001 0002 00000000"), nil), nil,
			hdr4 + "LEN=32 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=13 CODE=0 INCOMPLETE [12 bytes] "},
		{"icmp unknown type", ip4With(1, raw("2a00 0000 0001 0002"), nil), nil,
			hdr4 + "LEN=28 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=42 CODE=0 "},
		{"icmp port unreachable", ip4With(1, append(raw("0303 0000 00000000"), inner...), nil), func(p *events.Packet) { p.Mark = 16 },
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=3 CODE=3 [" + innerText + "] MARK=0x10 "},
		{"icmp fragmentation needed", ip4With(1, append(raw("0304 0000 0000 05dc"), inner...), nil), nil,
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=3 CODE=4 [" + innerText + "] MTU=1500 "},
		{"icmp redirect", ip4With(1, append(raw("0501 0000 ac110001"), inner...), nil), nil,
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=5 CODE=1 GATEWAY=172.17.0.1 [" + innerText + "] "},
		{"icmp parameter problem", ip4With(1, append(raw("0c00 0000 0900 0000"), inner...), nil), nil,
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=12 CODE=0 PARAMETER=9 "},
		{"icmp error about an icmp error recurses once", ip4With(1, append(raw("0b00 0000 00000000"),
			v4{id: 9, ttl: 1, proto: 1, src: c1, dst: c2, l4: append(raw("0303 0000 00000000"), inner...)}.bytes()...), nil), nil,
			hdr4 + "LEN=84 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=11 CODE=0 [SRC=172.17.0.2 DST=172.17.0.3 LEN=56 TOS=0x00 PREC=0x00 TTL=1 ID=9 PROTO=ICMP TYPE=3 CODE=3 ] "},
		{"icmp error with the 8 bytes of a tcp header", ip4With(1, append(raw("0b00 0000 00000000"),
			v4{id: 9, ttl: 1, proto: 6, src: c1, dst: c2, l4: tcpSYN[:8]}.bytes()...), nil), nil,
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=11 CODE=0 [SRC=172.17.0.2 DST=172.17.0.3 LEN=28 TOS=0x00 PREC=0x00 TTL=1 ID=9 PROTO=TCP INCOMPLETE [8 bytes] ] "},
		{"ah", ip4With(51, raw("06 04 0000 00000abc 00000001"), nil), nil,
			hdr4 + "LEN=32 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=AH SPI=0xabc "},
		{"esp", ip4With(50, raw("f1234567 00000001"), nil), nil,
			hdr4 + "LEN=28 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ESP SPI=0xf1234567 "},
		{"esp incomplete keeps the mark", ip4With(50, raw("f1"), nil), func(p *events.Packet) { p.Mark = 1 },
			hdr4 + "LEN=21 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ESP INCOMPLETE [1 bytes] MARK=0x1 "},
		{"other protocol", ip4With(132, raw("0000"), nil), nil,
			hdr4 + "LEN=22 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=132 "},
		{"not even a header", raw("4500"), nil, "TRUNCATED"},
		{"big tcp", ip4With(6, tcpSYN[:20:20], func(h *v4) {}), func(p *events.Packet) { p.Len = 70000; p.Data[2], p.Data[3], p.Data[32] = 0, 0, 0x50 },
			hdr4 + "LEN=70000 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=40000 DPT=12345 SEQ=1234567890 ACK=0 WINDOW=64240 RES=0x00 SYN URGP=0 "},

		{"not captured: tcp header", ip4With(6, synBytes, nil), func(p *events.Packet) { p.Data = p.Data[:24]; p.Mark = 1 },
			hdr4 + "LEN=60 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP [truncated by nftrace]"},
		{"not captured: tcp options", ip4With(6, synBytes, nil), func(p *events.Packet) { p.Data = p.Data[:40] },
			hdr4 + "LEN=60 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=TCP SPT=40000 DPT=12345 SEQ=1234567890 ACK=0 WINDOW=64240 RES=0x00 SYN URGP=0 [truncated by nftrace]"},
		{"not captured: embedded packet", ip4With(1, append(raw("0303 0000 00000000"), inner...), nil), func(p *events.Packet) { p.Data = p.Data[:30] },
			hdr4 + "LEN=56 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=3 CODE=3 [ [truncated by nftrace]"},
		{"not captured: anything", ip4With(6, synBytes, nil), func(p *events.Packet) { p.Data = nil },
			"[truncated by nftrace]"},

		{"6 icmp echo", ip6With(58, raw("8000 0000 0005 0001 00")), nil,
			hdr6 + "LEN=49 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=ICMPv6 TYPE=128 CODE=0 ID=5 SEQ=1 "},
		{"6 traffic class and flow label", v6{first: "6b8abcde", next: 17, hop: 1, src: g1, dst: g2, rest: udp53}.bytes(), nil,
			hdr6 + "LEN=56 TC=184 HOPLIMIT=1 FLOWLBL=703710 PROTO=UDP SPT=35559 DPT=53 LEN=16 "},
		{"6 tcp owner mark", ip6With(6, synBytes), func(p *events.Packet) { p.HasOwner, p.UID, p.GID, p.Mark = true, 4294967295, 5, 1 },
			hdr6 + "LEN=80 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=TCP SPT=40000 DPT=12345 SEQ=1234567890 ACK=0 WINDOW=64240 RES=0x00 SYN URGP=0 OPT (020405B40402080A000186A00000000001030307) UID=4294967295 GID=5 MARK=0x1 "},
		{"6 hop-by-hop (mld report)", ip6With(0, raw("3a00 05020000 0100", "8f00 0000 0000 0001")), nil,
			hdr6 + "LEN=56 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( ) PROTO=ICMPv6 TYPE=143 CODE=0 "},
		{"6 first fragment", ip6With(44, append(raw("1100 0001 deadbeef"), udp53...)), nil,
			hdr6 + "LEN=64 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( FRAG:0 INCOMPLETE ID:deadbeef ) PROTO=UDP SPT=35559 DPT=53 LEN=16 "},
		{"6 last fragment", ip6With(44, append(raw("1100 05a8 0000beef"), udp53...)), nil,
			hdr6 + "LEN=64 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( FRAG:1448 ID:0000beef ) PROTO=UDP "},
		{"6 options after a later fragment", ip6With(44, raw("3c00 05a8 0000beef", "1100 01040000 0000")), func(p *events.Packet) { p.Mark = 1 },
			hdr6 + "LEN=56 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( FRAG:1448 ID:0000beef ) OPT ( )"},
		{"6 fragment header cut short", ip6With(44, raw("1100 0001")), nil,
			hdr6 + "LEN=44 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( FRAG:TRUNCATED "},
		{"6 extension header missing", ip6With(43, nil), nil,
			hdr6 + "LEN=40 TC=0 HOPLIMIT=64 FLOWLBL=0 TRUNCATED"},
		{"6 ah then udp", ip6With(51, append(raw("1104 0000 00000abc 00000001 000000000000000000000000"), udp53...)), nil,
			hdr6 + "LEN=80 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( AH SPI=0xabc ) PROTO=UDP SPT=35559 DPT=53 LEN=16 "},
		{"6 ah incomplete", ip6With(51, raw("1104 0000")), nil,
			hdr6 + "LEN=44 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( AH INCOMPLETE [4 bytes] )"},
		{"6 esp ends the line", ip6With(50, raw("00000abc 00000001 ffff")), func(p *events.Packet) { p.Mark = 1 },
			hdr6 + "LEN=50 TC=0 HOPLIMIT=64 FLOWLBL=0 OPT ( ESP SPI=0xabc )"},
		{"6 no next header", ip6With(59, nil), nil,
			hdr6 + "LEN=40 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=59 "},
		{"6 packet too big", ip6With(58, append(raw("0200 0000 00000500"), v6{first: "60000000", next: 17, hop: 63, src: g2, dst: g1, rest: udp53}.bytes()...)), nil,
			hdr6 + "LEN=104 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=ICMPv6 TYPE=2 CODE=0 [SRC=fe80:0000:0000:0000:0042:acff:fe11:0002 DST=2001:0db8:0000:0000:0000:0000:0000:0001 LEN=56 TC=0 HOPLIMIT=63 FLOWLBL=0 PROTO=UDP SPT=35559 DPT=53 LEN=16 ] MTU=1280 "},
		{"6 parameter problem", ip6With(58, append(raw("0401 0000 00000028"), raw("60")...)), nil,
			hdr6 + "LEN=49 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=ICMPv6 TYPE=4 CODE=1 POINTER=00000028 [TRUNCATED] "},
		{"6 neighbour solicitation", ip6With(58, raw("8700 0000 00000000", "fe800000000000000042acfffe110002")), nil,
			hdr6 + "LEN=64 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=ICMPv6 TYPE=135 CODE=0 "},
		{"6 icmp incomplete drops the mark", ip6With(58, raw("8700")), func(p *events.Packet) { p.Mark = 1 },
			hdr6 + "LEN=42 TC=0 HOPLIMIT=64 FLOWLBL=0 PROTO=ICMPv6 INCOMPLETE [2 bytes] "},
		{"6 not captured: extension header", ip6With(0, raw("3a00 05020000 0100", "8f00 0000 0000 0001")), func(p *events.Packet) { p.Data = p.Data[:40] },
			hdr6 + "LEN=56 TC=0 HOPLIMIT=64 FLOWLBL=0 [truncated by nftrace]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pf, p := uint8(events.PFIPv4), pkt4(tc.data)
			if strings.HasPrefix(tc.name, "6 ") {
				pf, p = events.PFIPv6, pkt6(tc.data)
			}
			if tc.mod != nil {
				tc.mod(&p)
			}
			got := traceString(t, traceStep(pf, p))
			want := "TRACE: filter:FORWARD:rule:1 IN= OUT= " + tc.want + "\n"
			if got != want {
				t.Errorf("\n got %q\nwant %q", got, want)
			}
		})
	}
}

// Of the reserved bits kernels that know AE take one for it.
func TestTraceAE(t *testing.T) {
	for _, tt := range []struct {
		ae      bool
		byte12  string
		reserve string
	}{
		{false, "5f", "RES=0x3c CWR ACK URGP=0 "}, {true, "5f", "RES=0x38 AE CWR ACK URGP=0 "},
		{false, "51", "RES=0x04 CWR ACK URGP=0 "}, {true, "51", "RES=0x00 AE CWR ACK URGP=0 "},
		{false, "50", "RES=0x00 CWR ACK URGP=0 "}, {true, "50", "RES=0x00 CWR ACK URGP=0 "},
	} {
		p := pkt4(v4{id: 123, frag: 0x4000, ttl: 64, proto: 6, src: c2, dst: c1, l4: raw("0001 0002 ffffffff 00000001", tt.byte12, "90 0010 0000 0000")}.bytes())
		j := &events.Journey{Steps: []events.Step{traceStep(events.PFIPv4, p)}}
		r := NewTrace(TraceOptions{AE: tt.ae})
		for range 3 { // also where it prints what it has kept
			if got := string(r.Append(nil, j)); !strings.HasSuffix(got, "WINDOW=16 "+tt.reserve+"\n") {
				t.Errorf("%+v: got %q", tt, got)
			}
		}
	}
}

func TestTraceDevices(t *testing.T) {
	p := pkt4(echo4.bytes())
	const packet = "SRC=172.17.0.3 DST=172.17.0.2 LEN=84 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=8 CODE=0 ID=5 SEQ=1 \n"
	const macText = "MAC=02:42:ac:11:00:02:02:42:ac:11:00:03:08:00 "
	docker0, eth0 := events.Device{Index: 3, Name: "docker0"}, events.Device{Index: 2, Name: "eth0"}
	v1, v2 := events.Device{Index: 5, Name: "vethc1"}, events.Device{Index: 6, Name: "vethc2"}

	for _, tc := range []struct {
		name string
		mod  func(*events.Step, *events.Packet)
		want string
	}{
		{"bridge ports", func(s *events.Step, p *events.Packet) {
			s.In, s.Out, s.PhysIn, s.PhysOut, p.MAC = docker0, docker0, v2, v1, dockMAC
		}, "IN=docker0 OUT=docker0 PHYSIN=vethc2 PHYSOUT=vethc1 " + macText + packet},
		{"the port is the device", func(s *events.Step, p *events.Packet) {
			s.In, s.PhysIn, p.MAC = v2, v2, dockMAC
		}, "IN=vethc2 OUT= " + macText + packet},
		{"the port is the device, out", func(s *events.Step, p *events.Packet) {
			s.Out, s.PhysOut = v1, v1
		}, "IN= OUT=vethc1 " + packet},
		{"output: no MAC even where there is one", func(s *events.Step, p *events.Packet) {
			s.Out, p.MAC = eth0, dockMAC
		}, "IN= OUT=eth0 " + packet},
		{"input from a device without a header", func(s *events.Step, p *events.Packet) {
			s.In, p.MACDevType = events.Device{Index: 9, Name: "tun0"}, 65534
		}, "IN=tun0 OUT= MAC= " + packet},
		{"one byte of header", func(s *events.Step, p *events.Packet) {
			s.In, p.MAC = events.Device{Index: 9, Name: "x"}, []byte{0xab}
		}, "IN=x OUT= MAC=ab " + packet},
		{"a sit device with a header", func(s *events.Step, p *events.Packet) {
			s.In, p.MACDevType, p.MAC = events.Device{Index: 9, Name: "sit0"}, arphrdSIT, make([]byte, 20)
		}, "IN=sit0 OUT= MAC= [truncated by nftrace]\n"},
		{"vlan tag beside the packet is not printed", func(s *events.Step, p *events.Packet) {
			s.In, p.MAC, p.VLAN = eth0, dockMAC, 100
		}, "IN=eth0 OUT= " + macText + packet},
		{"hostile name", func(s *events.Step, p *events.Packet) {
			s.Out = events.Device{Index: 9, Name: "e\x1b[31m\u202e\xff\u009bé"}
		}, `IN= OUT=e\x1b[31m\xe2\x80\xae\xff\xc2\x9bé ` + packet},
		{"unknown protocol on a bridge", func(s *events.Step, p *events.Packet) {
			s.PF, s.In, p.EtherType, p.MAC = events.PFBridge, v2, 0x88cc, dockMAC
		}, "IN=vethc2 OUT= " + macText + "\n"},
		{"IPv4 on a bridge", func(s *events.Step, p *events.Packet) {
			s.PF, s.In, p.MAC = events.PFBridge, v2, dockMAC
		}, "IN=vethc2 OUT= " + macText + packet},
		{"ARP on a bridge", func(s *events.Step, p *events.Packet) {
			p.EtherType, p.Data = 0x0806, raw("0001 0800 06 04 0001 0242ac110003 ac110003 000000000000 ac110002")
			s.PF, s.In, p.MAC, p.Len = events.PFBridge, v2, dockMAC, len(p.Data)
		}, "IN=vethc2 OUT= ARP HTYPE=1 PTYPE=0x0800 OPCODE=1 MACSRC=02:42:ac:11:00:03 IPSRC=172.17.0.3 MACDST=00:00:00:00:00:00 IPDST=172.17.0.2\n"},
		{"ARP cut short", func(s *events.Step, p *events.Packet) {
			p.EtherType, p.Data = 0x0806, raw("0001 0800 06 04 0002 0242")
			s.PF, s.In, p.Len = events.PFBridge, v2, len(p.Data)
		}, "IN=vethc2 OUT= ARP HTYPE=1 PTYPE=0x0800 OPCODE=2 INCOMPLETE [2 bytes]\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := traceStep(events.PFIPv4, p)
			tc.mod(&s, s.Table.Met[0].Pkt)
			want := "TRACE: filter:FORWARD:rule:1 " + tc.want
			if s.PF == events.PFBridge {
				want = "TRACE: eb:filter:FORWARD:rule:1 " + tc.want
			}
			if got := traceString(t, s); got != want {
				t.Errorf("\n got %q\nwant %q", got, want)
			}
		})
	}
}

func TestTraceUnresolved(t *testing.T) {
	p := pkt4(echo4.bytes())
	s := traceStep(events.PFIPv4, p)
	s.In = events.Device{Index: 2, Name: "eth0"}
	s.Table.Met = []events.Met{{Unsure: "an earlier target changed it\n"}}
	if got, want := traceString(t, s), `TRACE: filter:FORWARD:rule:1 IN=eth0 OUT= [packet unresolved: an earlier target changed it\x0a]`+"\n"; got != want {
		t.Errorf("\n got %q\nwant %q", got, want)
	}

	s.Table.Rules, s.Table.Met = nil, nil
	s.Table.Unresolved = "two runs overlapped"
	if got, want := traceString(t, s), "TRACE: filter:FORWARD:unresolved: two runs overlapped IN=eth0 OUT= MAC= SRC=172.17.0.3 DST=172.17.0.2 LEN=84 TOS=0x00 PREC=0x00 TTL=64 ID=123 DF PROTO=ICMP TYPE=8 CODE=0 ID=5 SEQ=1 \n"; got != want {
		t.Errorf("\n got %q\nwant %q", got, want)
	}
}

func TestTraceHoles(t *testing.T) {
	var b bytes.Buffer
	j := events.Journey{HalfSeen: "attached\nin the middle", Lost: 3}
	if err := Trace(&b, &j); err != nil {
		t.Fatal(err)
	}
	want := `# nftrace: half seen: attached\x0ain the middle` + "\n# nftrace: 3 records of this packet were lost: its path has a hole\n"
	if b.String() != want {
		t.Errorf("\n got %q\nwant %q", b.String(), want)
	}
}

// The kernel's buffer ends a long line: 175 headers of IPv6 options are 175 × "OPT ( ) ".
func TestTraceLineLength(t *testing.T) {
	var ext []byte
	for range 175 {
		ext = append(ext, raw("3c00 01040000 0000")...)
	}
	p := pkt6(v6{first: "60000000", next: 60, hop: 64, src: g1, dst: g2, rest: ext}.bytes())
	got := strings.TrimSuffix(traceString(t, traceStep(events.PFIPv6, p)), "\n")
	if len(got) != 1016 {
		t.Errorf("line of %d bytes, want 1016", len(got))
	}
	// Data that ends behind the kernel's own end is not missed.
	p.Data = p.Data[:40+170*8]
	if g := strings.TrimSuffix(traceString(t, traceStep(events.PFIPv6, p)), "\n"); g != got {
		t.Errorf("got %q", g)
	}
}

func checkLine(t *testing.T, line string) {
	t.Helper()
	if !utf8.ValidString(line) {
		t.Errorf("not UTF-8: %q", line)
	}
	for _, r := range line {
		if unsafeRune(r) {
			t.Errorf("%U in %q", r, line)
		}
	}
}

func FuzzTracePacket(f *testing.F) {
	f.Add(uint8(events.PFIPv4), uint16(0x0800), 84, echo4.bytes(), dockMAC, uint16(1), "eth0", "FORWARD")
	f.Add(uint8(events.PFIPv6), uint16(0x86dd), 60, v6{first: "60000000", next: 44, src: g1, dst: g2, rest: raw("1100 0001 deadbeef")}.bytes(), []byte(nil), uint16(776), "\x1b", "a:b")
	f.Add(uint8(events.PFBridge), uint16(0x0806), 28, raw("0001 0800 06 04 0001"), dockMAC, uint16(1), "", "")
	f.Fuzz(func(t *testing.T, pf uint8, etherType uint16, length int, data, mac []byte, devType uint16, dev, chain string) {
		p := events.Packet{Family: pf, EtherType: etherType, Len: length, Data: data, MAC: mac, MACDevType: devType, Mark: 1, HasOwner: true}
		s := traceStep(pf, p)
		s.In = events.Device{Index: 1, Name: dev}
		s.PhysOut = events.Device{Index: 2, Name: dev}
		s.Table.Rules[0].Chain = chain
		got := traceString(t, s)
		line, ok := strings.CutSuffix(got, "\n")
		if !ok {
			t.Fatalf("no newline: %q", got)
		}
		checkLine(t, line)
		if got != traceString(t, s) {
			t.Error("not the same twice")
		}
		// What is captured less only shortens the line: never does a
		// byte that was not captured change what is printed.
		if len(data) > 0 {
			s.Table.Met[0].Pkt.Data = data[:len(data)/2]
			less := strings.TrimSuffix(traceString(t, s), "\n")
			less, cut := strings.CutSuffix(less, truncated)
			if cut && !strings.HasPrefix(line, strings.TrimSuffix(less, " ")) || !cut && less != line {
				t.Errorf("\nless %q\nmore %q", less, line)
			}
		}
	})
}
