package symbolize

import (
	"bytes"
	"net/netip"
	"testing"
)

func TestPlausible(t *testing.T) {
	tab := loadFixture(t, "goto.v4.filter").table
	docker := loadFixture(t, "docker.v4.filter").table
	six := loadFixture(t, "six.v6.filter").table
	v4 := PacketInfo{Src: netip.MustParseAddr("10.9.9.9"), Dst: netip.MustParseAddr("10.1.2.3"), Proto: 6, In: "eth0"}
	with := func(p PacketInfo, f func(*PacketInfo)) PacketInfo { f(&p); return p }
	v6 := PacketInfo{Src: netip.MustParseAddr("2001:db8::1"), Dst: netip.MustParseAddr("fe80::1"), Proto: 6, In: "eth0"}
	for _, tt := range []struct {
		tab   *Table
		chain string
		num   int
		p     PacketInfo
		want  bool
	}{
		{tab, "INPUT", 1, v4, false}, // -i lo
		{tab, "INPUT", 1, with(v4, func(p *PacketInfo) { p.In = "lo" }), true},
		{tab, "INPUT", 1, with(v4, func(p *PacketInfo) { p.In = "lo0" }), false},
		{tab, "INPUT", 5, v4, true}, // -s 10.9.9.9
		{tab, "INPUT", 5, with(v4, func(p *PacketInfo) { p.Src = v4.Dst }), false},
		{tab, "INPUT", 11, v4, false}, // -f
		{tab, "INPUT", 11, with(v4, func(p *PacketInfo) { p.Frag = true }), true},
		{tab, "A", 1, v4, true}, // -s 10/8
		{tab, "A", 2, v4, true}, // -d 10.1.2.3 ! -p udp
		{tab, "A", 2, with(v4, func(p *PacketInfo) { p.Proto = 17 }), false},
		{tab, "A", 2, with(v4, func(p *PacketInfo) { p.Proto = -1 }), true},
		{tab, "A", 3, v4, false}, // -i veth+
		{tab, "A", 3, with(v4, func(p *PacketInfo) { p.In = "veth12" }), true},
		{tab, "A", 3, with(v4, func(p *PacketInfo) { p.In = "veth" }), true},
		{tab, "A", 4, PacketInfo{}, true},
		{docker, "FORWARD", 5, with(v4, func(p *PacketInfo) { p.In, p.Out = "docker0", "eth0" }), true}, // ! -o docker0
		{docker, "FORWARD", 5, with(v4, func(p *PacketInfo) { p.In, p.Out = "docker0", "docker0" }), false},
		{six, "INPUT", 1, v6, false}, // -p ipv6-icmp
		{six, "INPUT", 1, with(v6, func(p *PacketInfo) { p.Proto = 58 }), true},
		{six, "INPUT", 2, v6, true}, // -s 2001:db8::/32 ! -i lo
		{six, "INPUT", 2, with(v6, func(p *PacketInfo) { p.In = "lo" }), false},
		{six, "INPUT", 3, v6, true},
		{six, "INPUT", 3, with(v6, func(p *PacketInfo) { p.Dst = v6.Src }), false},
	} {
		i := at(t, tt.tab, tt.chain, tt.num)
		if got := tt.tab.Plausible(i, tt.p); got != tt.want {
			t.Errorf("%s with %+v: %v", tt.tab.RuleText(i), tt.p, got)
		}
	}
}

// Where LooksAtPacket says so, what Plausible says depends on the devices alone.
func TestLooksAtPacket(t *testing.T) {
	looks, not := 0, 0
	for _, name := range []string{"goto.v4.filter", "docker.v4.filter", "docker.v4.nat", "six.v6.filter"} {
		tab := loadFixture(t, name).table
		addrs := []netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("172.17.0.2"), netip.MustParseAddr("192.0.2.1")}
		if tab.Family == IPv6 {
			addrs = []netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("::1")}
		}
		for i := range tab.Entries {
			said := map[PacketInfo]bool{} // by the devices
			same := true
			for _, devices := range []PacketInfo{{In: "eth0"}, {In: "docker0", Out: "eth0"}, {Out: "docker0"}, {In: "lo"}} {
				for _, src := range addrs {
					for _, dst := range addrs {
						for _, proto := range []int{6, 17, 58, -1} {
							p := PacketInfo{Src: src, Dst: dst, Proto: proto, In: devices.In, Out: devices.Out, Frag: proto == 58}
							got := tab.Plausible(i, p)
							if was, ok := said[devices]; ok && was != got {
								same = false
							}
							said[devices] = got
						}
					}
				}
			}
			switch {
			case tab.LooksAtPacket(i):
				looks++
			case !same:
				t.Errorf("%s: %q looks at the packet", name, tab.RuleText(i))
			default:
				not++
			}
		}
	}
	if looks < 5 || not < 5 {
		t.Errorf("void: %d look at the packet, %d do not", looks, not)
	}
}

func TestApply(t *testing.T) {
	v4 := []byte{0x46, 0x03, 0, 52, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 0,
		0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0xc2, 0, 0, 0, 0, 0, 0, 1, 8, 2, 4}
	v4 = append(v4[:24:24], append(tcpHeader(0xc2), 2, 4, 5, 0xb4, 8, 4, 9, 9)...)
	v6 := append([]byte{0x6a, 0xb1, 2, 3, 0, 0, 6, 64}, make([]byte, 32)...)
	change := func(b []byte, at int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], v)
		return b
	}
	target := func(name string, rev uint8, data ...byte) Entry {
		return Entry{Kind: TargetExtension, Target: name, Revision: rev, Data: append(data, make([]byte, 40)...)}
	}
	for _, tt := range []struct {
		name     string
		family   Family
		e        Entry
		in, want []byte
		mark     uint32
		ok       bool
	}{
		{"MARK", IPv4, target("MARK", 2, 1, 0, 0, 0, 0x0f, 0, 0, 0), v4, v4, 0x71, true},
		{"old MARK", IPv4, target("MARK", 1), v4, v4, 0x77, false},
		{"TPROXY", IPv4, target("TPROXY", 1, 0x0f, 0, 0, 0, 1, 0, 0, 0), v4, v4, 0x71, true},
		{"TPROXY 6", IPv6, target("TPROXY", 1, 0, 0, 0, 0, 8), v6, v6, 0x7f, true},
		{"TTL set", IPv4, target("TTL", 0, 0, 9), v4, change(v4, 8, 9), 0x77, true},
		{"TTL inc", IPv4, target("TTL", 0, 1, 250), v4, change(v4, 8, 255), 0x77, true},
		{"TTL dec", IPv4, target("TTL", 0, 2, 1), v4, change(v4, 8, 63), 0x77, true},
		{"TTL dec below", IPv4, target("TTL", 0, 2, 70), v4, change(v4, 8, 0), 0x77, true},
		{"HL dec", IPv6, target("HL", 0, 2, 1), v6, change(v6, 7, 63), 0x77, true},
		{"TOS", IPv4, target("TOS", 1, 0x10, 0x3f), v4, change(v4, 1, 0x10), 0x77, true},
		{"TOS 6", IPv6, target("TOS", 1, 0x10, 0x3f), v6, change(v6, 0, 0x69, 0x01), 0x77, true},
		{"DSCP", IPv4, target("DSCP", 0, 0x12), v4, change(v4, 1, 0x4b), 0x77, true},
		{"DSCP 6", IPv6, target("DSCP", 0, 0x12), v6, change(v6, 0, 0x64, 0xb1), 0x77, true},
		{"ECN ip", IPv4, target("ECN", 0, 1, 2), v4, change(v4, 1, 2), 0x77, true},
		{"ECN remove", IPv4, target("ECN", 0, 0x30, 0, 0), v4, change(v4, 24+13, 0x02), 0x77, true},
		{"TCPOPTSTRIP", IPv4, target("TCPOPTSTRIP", 0, 0, 1, 0, 0), v4, change(v4, 24+24, 1, 1, 1, 1), 0x77, true},
		{"TCPMSS", IPv4, target("TCPMSS", 0), v4, v4, 0x77, false},
		{"CONNMARK restore", IPv4, target("CONNMARK", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2), v4, v4, 0x77, false},
		{"CONNMARK save", IPv4, target("CONNMARK", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1), v4, v4, 0x77, true},
		{"CONNMARK restore, revision 2", IPv4, target("CONNMARK", 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2), v4, v4, 0x77, false},
		{"CONNMARK save, revision 2", IPv4, target("CONNMARK", 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 1), v4, v4, 0x77, true},
		{"SNPT", IPv6, target("SNPT", 0), v6, v6, 0x77, false},
		{"unknown", IPv6, target("XYZZY", 0), v6, v6, 0x77, false},
		{"LOG", IPv6, target("LOG", 0), v6, v6, 0x77, true},
		{"not captured", IPv4, target("TTL", 0, 0, 9), v4[:12], v4[:12], 0x77, false},
		{"DNAT ends the run", IPv4, target("DNAT", 2), v4, v4, 0x77, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tab := &Table{Family: tt.family, Entries: []Entry{tt.e}}
			before := bytes.Clone(tt.in)
			mark, got, ok := tab.Apply(0, 0x77, tt.in)
			want := bytes.Clone(tt.want)
			if !bytes.Equal(tt.in, before) {
				t.Error("the input was written to")
			}
			if ok != tt.ok || ok && mark != tt.mark {
				t.Fatalf("mark %#x, ok %v", mark, ok)
			}
			if tt.family == IPv4 && !bytes.Equal(tt.in, got) {
				p := packet{b: want}
				p.checksum()
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got\n% x\nwant\n% x", got, want)
			}
		})
	}
}

func tcpHeader(flags byte) []byte {
	b := make([]byte, 20)
	b[12], b[13] = 0x70, flags
	return b
}
