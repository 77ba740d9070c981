package symbolize

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

// NF_ARP_IN, NF_ARP_OUT
const (
	arpIn  = 0
	arpOut = 1
)

// request is ARP who-has 10.0.0.2 tell 10.0.0.1.
var request = [ARPLen]byte{0, 1, 8, 0, 6, 4, 0, 1,
	2, 0, 0, 0, 0, 1, 10, 0, 0, 1,
	0, 0, 0, 0, 0, 0, 10, 0, 0, 2}

// changed is request with other bytes from at on.
func changed(at int, b ...byte) *[ARPLen]byte {
	p := request
	copy(p[at:], b)
	return &p
}

func TestARPFixture(t *testing.T) {
	tab := loadFixture(t, "arp.arp.filter").table
	if tab.HookEntry[arpIn] != 0 || tab.HookEntry[3] != -1 || tab.ValidHooks != 7 {
		t.Errorf("hooks %#x at %v", tab.ValidHooks, tab.HookEntry)
	}
	for i, want := range map[int]string{
		0:                      "INPUT:rule:1",
		tab.Underflow[arpIn]:   "INPUT:policy:8",
		tab.HookEntry[arpOut]:  "OUTPUT:rule:1",
		at(t, tab, "user", 8):  "user:return:8",
		at(t, tab, "user", 4):  "user:rule:4",
		at(t, tab, "other", 2): "other:return:2",
	} {
		hook := arpIn
		if strings.HasPrefix(want, "OUTPUT") {
			hook = arpOut
		}
		chain, kind, num := tab.TraceName(hook, i)
		if got := (Visit{Chain: chain, Type: kind, Num: num}).String(); got != want {
			t.Errorf("entry %d is %s, want %s", i, got, want)
		}
	}
}

// A walk through a table of ARP: a target that goes on, one that ends the run.
func TestARPWalk(t *testing.T) {
	tab := loadFixture(t, "arp.arp.filter").table
	user := func(n int) int { return at(t, tab, "user", n) }
	p, err := tab.Walk(arpIn, once(0, user(1), user(2)), nfDrop, nil)
	wantLines(t, p, err, "INPUT:rule:1 jump user", "user:rule:1 continue", "user:rule:2 mangle")
	p, err = tab.Walk(arpIn, once(0, user(1), user(3)), nfAccept, nil)
	wantLines(t, p, err, "INPUT:rule:1 jump user", "user:rule:1 continue", "user:rule:3 mangle")
	p, err = tab.Walk(arpIn, once(0, user(4), at(t, tab, "other", 1), at(t, tab, "other", 2), user(5), user(6), user(7), user(8), 3), nfAccept, nil)
	wantLines(t, p, err, "INPUT:rule:1 jump user", "user:rule:4 jump other", "other:rule:1 continue", "other:return:2 RETURN",
		"user:rule:5 continue", "user:rule:6 continue", "user:rule:7 continue", "user:return:8 RETURN", "INPUT:rule:4 ACCEPT")
	// What ends the run is the last.
	if p, err := tab.Walk(arpIn, once(0, user(2), user(3)), nfAccept, nil); err == nil {
		t.Errorf("behind a mangle that drops: %v", lines(p))
	}
	// arp_tables knows no hotdrop.
	if p, err := tab.Walk(arpIn, once(0), nfDrop, nil); err == nil {
		t.Errorf("hotdrop: %v", p)
	}
	if _, err := tab.Walk(3, once(0), nfDrop, nil); err == nil {
		t.Error("a hook that is not there")
	}
}

func TestARPPlausible(t *testing.T) {
	tab := loadFixture(t, "arp.arp.filter").table
	drop := changed(0, request[:]...) // INPUT 2's packet
	copy(drop[arpSrcIP:], []byte{11, 0, 0, 1})
	for _, tt := range []struct {
		chain string
		num   int
		pkt   *[ARPLen]byte
		in    string
		want  bool
	}{
		{"INPUT", 1, &request, "eth0", true},
		{"INPUT", 1, changed(arpSrcIP, 10, 0, 0, 3), "eth0", false},
		{"INPUT", 1, nil, "eth0", true},
		{"INPUT", 2, drop, "eth0", true},
		{"INPUT", 2, drop, "eth1", false},
		{"INPUT", 2, &request, "eth0", false},                                 // ! -s
		{"INPUT", 2, changed(arpSrcMAC, 2, 0, 0, 0, 0, 2, 11), "eth0", false}, // --source-mac
		{"INPUT", 2, changed(6, 0, 2), "eth0", false},                         // --opcode
		{"INPUT", 3, &request, "veth9", true},                                 // ! --destination-mac, ! --opcode
		{"INPUT", 3, changed(arpDstMAC, 2, 0, 0, 9), "veth9", false},          //
		{"INPUT", 3, changed(6, 0, 2), "veth9", false},                        //
		{"INPUT", 3, &request, "eth0", false},                                 //
		{"INPUT", 4, &request, "x", true},                                     // --h-length, --h-type, --proto-type
		{"INPUT", 4, changed(4, 4), "x", false},                               //
		{"INPUT", 4, changed(0, 0, 6), "x", false},                            //
		{"INPUT", 4, changed(2, 8, 6), "x", false},                            //
		{"INPUT", 5, changed(0, 0, 6, 8, 0, 4), "x", true},                    //
		{"INPUT", 6, changed(0, 0, 6, 8, 6), "x", true},                       // ! -i, ! --h-type, ! --proto-type
		{"INPUT", 6, changed(0, 0, 6, 8, 6), "eth0", false},                   //
		{"INPUT", 6, changed(0, 0, 6), "x", false},                            //
		{"INPUT", 7, changed(arpSrcIP, 10, 1, 9, 0), "x", true},               // a mask with a gap
		{"INPUT", 7, changed(arpSrcIP, 10, 1, 9, 1), "x", false},              //
		{"user", 4, &request, "x", true},                                      // -d
		{"user", 4, changed(arpDstIP, 10, 0, 1, 0), "x", false},               //
	} {
		i := at(t, tab, tt.chain, tt.num)
		if got := tab.Plausible(i, PacketInfo{ARP: tt.pkt, In: tt.in}); got != tt.want {
			t.Errorf("%s:%d: %v for % x from %s", tt.chain, tt.num, got, tt.pkt, tt.in)
		}
	}
	if out := at(t, tab, "OUTPUT", 2); tab.Plausible(out, PacketInfo{Out: "eth7"}) || !tab.Plausible(out, PacketInfo{Out: "br0"}) {
		t.Error("! -o eth+")
	}
	for _, tt := range []struct {
		chain string
		num   int
		want  bool
	}{{"INPUT", 1, true}, {"INPUT", 4, true}, {"user", 5, false}, {"OUTPUT", 2, false}} {
		if got := tab.LooksAtPacket(at(t, tab, tt.chain, tt.num)); got != tt.want {
			t.Errorf("%s:%d looks at the packet: %v", tt.chain, tt.num, got)
		}
	}
}

func TestARPApply(t *testing.T) {
	tab := loadFixture(t, "arp.arp.filter").table
	i := at(t, tab, "user", 1)
	_, data, ok := tab.Apply(i, 0, request[:])
	want := changed(arpSrcIP, 1, 2, 3, 4)
	copy(want[arpDstMAC:], []byte{2, 0, 0, 0, 0, 9})
	if !ok || !bytes.Equal(data, want[:]) {
		t.Errorf("% x, %v", data, ok)
	}
	if request != *changed(0) {
		t.Error("the packet was written to")
	}
	if _, _, ok := tab.Apply(i, 0, changed(4, 8)[:]); ok {
		t.Error("addresses of another length")
	}
	if _, _, ok := tab.Apply(i, 0, request[:20]); ok {
		t.Error("a packet cut short")
	}
	if mark, _, ok := tab.Apply(at(t, tab, "user", 7), 1, request[:]); !ok || mark != 0x11 {
		t.Errorf("mark %#x, %v", mark, ok)
	}
}

// The entries of struct arpt_getinfo are fewer than those of ipt_getinfo.
func TestARPInfo(t *testing.T) {
	if n := infoSize(ARP); n != 68 {
		t.Errorf("%d bytes", n)
	}
	if n := infoSize(IPv4); n != 84 {
		t.Errorf("%d bytes", n)
	}
	info := Info{ValidHooks: 7, HookEntry: [NumHooks]uint32{1, 2, 3}, Underflow: [NumHooks]uint32{4, 5, 6}, NumEntries: 7, Size: 8}
	if got := parseInfo(ARP, putInfo(ARP, "filter", info)); got != info {
		t.Errorf("%+v", got)
	}
	_, _, name, blob := fixtureBytes(t, "arp.arp.filter")
	info.ValidHooks = 1 << 3
	info.Size = uint32(len(blob))
	if _, err := ParseTable(ARP, name, info, blob); err == nil {
		t.Error("a hook that ARP does not have")
	}
	if binary.NativeEndian.Uint16(blob[164:]) != 192 {
		t.Error("struct arpt_entry is laid out otherwise")
	}
	if a, ok := netip.AddrFromSlice(blob[:4]); !ok || a.String() != "10.0.0.1" {
		t.Errorf("the first rule is for %v", a)
	}
}

// A chain is entered twice, and between the two a target rewrites what one of its rules looks at.
func TestFollowARP(t *testing.T) {
	mangle := make([]byte, mangleTarget+4)
	copy(mangle[mangleSrcIP:], []byte{10, 0, 0, 0})
	mangle[mangleFlags] = 4
	binary.NativeEndian.PutUint32(mangle[mangleTarget:], xtContinue)
	tab := build(t, ARP,
		chain{"INPUT", "DROP", []rule{{target: "jump a"}, {target: arpMangle, data: mangle}, {target: "jump a"}}},
		chain{"a", "", []rule{{src: "10.0.0.0", target: "MARK", data: make([]byte, 8)}, {target: "RETURN"}}})
	for i := range tab.Entries {
		if tab.Entries[i].Target == "MARK" {
			tab.Entries[i].Revision = 2
		}
	}
	in := func(n int) int { return at(t, tab, "INPUT", n) }
	a := at(t, tab, "a", 1)
	hits := append(once(in(1), in(2), in(3), in(4), a), Hit{Index: at(t, tab, "a", 2), Packets: 2})
	if p, err := tab.Walk(arpIn, hits, nfDrop, nil); !errors.Is(err, ErrAmbiguous) {
		t.Fatalf("%v, %v", p, err)
	}
	p, verdict, err := tab.FollowARP(arpIn, hits, PacketInfo{ARP: &request})
	wantLines(t, p, err, "INPUT:rule:1 jump a", "a:return:2 RETURN", "INPUT:rule:2 continue", "INPUT:rule:3 jump a",
		"a:rule:1 continue", "a:return:2 RETURN", "INPUT:policy:4 DROP")
	if verdict != nfDrop {
		t.Errorf("verdict %d", verdict)
	}
	for name, tt := range map[string]struct {
		hits []Hit
		p    PacketInfo
		hook int
	}{
		"a rule too few":  {hits[:len(hits)-1], PacketInfo{ARP: &request}, arpIn},
		"a rule too many": {append(once(at(t, tab, "a", 3)), hits...), PacketInfo{ARP: &request}, arpIn},
		"another packet":  {hits, PacketInfo{ARP: changed(arpSrcIP, 10, 0, 0, 0)}, arpIn},
		"no packet":       {hits, PacketInfo{}, arpIn},
		"lengths":         {hits, PacketInfo{ARP: changed(4, 8)}, arpIn},
		"no such hook":    {hits, PacketInfo{ARP: &request}, arpOut},
	} {
		if p, _, err := tab.FollowARP(tt.hook, tt.hits, tt.p); !errors.Is(err, ErrNoWalk) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}

// What arptables-legacy -L -n prints of rules.
func TestARPRuleText(t *testing.T) {
	tab := build(t, ARP, chain{"INPUT", "ACCEPT", []rule{{target: "MARK", data: make([]byte, 8)}}})
	e := &tab.Entries[0]
	e.Revision = 2
	for _, tt := range []struct {
		mark, mask       uint32
		proto, protoMask uint16
		want             string
	}{
		{0xb, 0, 0, 0, "-j MARK --set-mark b"},
		{0, 0, 0, 0, "-j MARK --and-mark ffffffff"}, // of --set-mark 0
		{0, 0xfffffffc, 0, 0, "-j MARK --and-mark 3"},
		{0x10, 0x10, 0, 0, "-j MARK --or-mark 10"},
		{0x10, 0x10, 0x800, 0xffff, "-j MARK --proto-type 0x800 --or-mark 10"},
		{0x10, 0x10, 0x800, 0xff, "-j MARK --proto-type 0x800/ff --or-mark 10"},
	} {
		e.Data = binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, tt.mark), tt.mask)
		e.Header.arp.protoType, e.Header.arp.protoMask = tt.proto, tt.protoMask
		if got := tab.RuleText(0); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}
