package main

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// player runs packets through a session and prints them.
type player struct {
	t    *testing.T
	s    *session
	out  bytes.Buffer
	jid  uint64
	anew bool // parts are resolved as if there had been none before
}

func newPlayer(t *testing.T, format func() render.Renderer) *player {
	p := &player{t: t}
	p.s, _ = forwarded(t)
	p.s.out.Renderer, p.s.out.w = format(), &p.out
	return p
}

// play returns what is printed of a packet.
func (p *player) play(records [][]byte) string {
	p.t.Helper()
	p.jid++
	at := uint64(p.jid) * uint64(time.Second)
	for i, raw := range records {
		// With room for the largest record, as the ring buffer has.
		raw = append(make([]byte, 0, unsafe.Sizeof(bpf.NftraceRecHook{})), raw...)
		h := (*bpf.NftraceRecHdr)(unsafe.Pointer(&raw[0]))
		h.Jid, h.Ts = 1, at+uint64(i)
		if done, err := p.s.asm.Add(raw); err != nil || len(done) > 0 {
			p.t.Fatalf("%d journeys, %v", len(done), err)
		}
	}
	js := p.s.asm.Flush(1)
	for _, j := range js {
		j.ID, j.Start = 0, 0
		for i := range j.Steps {
			s := &j.Steps[i]
			s.Time = 0
			if s.Table != nil && p.anew {
				s.Table.Part.Pattern = nil
			}
		}
	}
	p.out.Reset()
	if err := errors.Join(p.s.print(js), p.s.flush()); err != nil {
		p.t.Fatal(err)
	}
	return p.out.String()
}

var formats = map[string]func() render.Renderer{
	"trace": func() render.Renderer { return render.NewTrace(render.TraceOptions{}) },
	"tree":  func() render.Renderer { return render.NewTree(render.TreeOptions{}) },
	"json":  render.NewJSON,
}

// hookOf is a packet that comes to a hook with tables, and what becomes of it there.
func hookOf(pkt func(p *bpf.NftracePkt), in string, tables []bpf.NftraceHookTable, end bpf.NftraceRecType, hits ...bpf.NftraceHit) [][]byte {
	r := &recorder{netns: 2, pkt: pkt}
	r.hook(events.PFIPv4, dev(2, in), dev(5, "eth0"), tables, hits...)
	if end == bpf.NftraceRecTypeREC_XMIT {
		r.device(end, dev(5, "eth0"))
	} else {
		h := r.header(end)
		add(r, &h, unsafe.Sizeof(h))
	}
	r.end()
	return r.records
}

func tableOf(private, gen uint64, name string) bpf.NftraceHookTable {
	t := bpf.NftraceHookTable{Private: private, Gen: gen}
	for i := range name {
		t.Name[i] = int8(name[i])
	}
	return t
}

type packet struct {
	name    string
	records [][]byte
	has     string // in its trace lines
}

// What is kept of parts makes no difference to what is said of a packet, whichever packets
// came before it.
func TestKnownParts(t *testing.T) {
	const accepted, dropped = bpf.NftraceRecTypeREC_XMIT, bpf.NftraceRecTypeREC_DROP
	hit := func(table, index, packets int) bpf.NftraceHit {
		return bpf.NftraceHit{Table: uint16(table), Index: uint32(index), Packets: uint16(packets), Bytes: uint64(84 * packets)}
	}
	mangle, filter, other, opaque := tableOf(0xa000, 100, "mangle"), tableOf(0xb000, 101, "filter"), tableOf(0xb000, 102, "filter"), tableOf(0xa000, 103, "mangle")
	ambiguous, open := tableOf(0xb000, 104, "filter"), tableOf(0xb000, 105, "filter")
	know := func(p *player) {
		for _, known := range []struct {
			as          bpf.NftraceHookTable
			input, user []rule
		}{
			{mangle, []rule{markIf(7), {cond: true}}, nil},
			{filter, []rule{{cond: true, target: "jump U"}, {cond: true, target: "ACCEPT"}}, []rule{{cond: true}}},
			{other, []rule{{cond: true}, {cond: true, target: "jump U"}, {cond: true, target: "DROP"}}, []rule{{cond: true}}},
			{opaque, []rule{unknownTarget, {cond: true}}, nil},
			{ambiguous, []rule{{cond: true, target: "jump U"}, {cond: true, target: "jump U"}}, []rule{{target: "LOG", match: "limit"}, {target: "LOG", match: "limit"}}},
			{open, []rule{{target: "LOG", match: "limit"}}, nil},
		} {
			id := events.TableID{Private: known.as.Private, Gen: known.as.Gen}
			name := strings.TrimRight(string(unsafe.Slice((*byte)(unsafe.Pointer(&known.as.Name[0])), 8)), "\x00")
			p.s.res.tables.keep(&ruleset{id: id, table: namedTable(p.t, name, known.input, known.user)})
		}
	}
	both := []bpf.NftraceHookTable{filter, mangle}
	usual := []bpf.NftraceHit{hit(1, 0, 1), hit(1, 1, 1), hit(1, 2, 1), hit(0, 0, 1), hit(0, 1, 1), hit(0, 4, 1), hit(0, 5, 1)}
	opaqueHits := slices.Concat([]bpf.NftraceHit{hit(1, 0, 1), hit(1, 1, 1), hit(1, 2, 1)}, usual[3:])
	type pkt = bpf.NftracePkt
	longer := slices.Clone(usual)
	for i := range longer {
		longer[i].Bytes = 1000 * uint64(longer[i].Packets)
	}
	odd := slices.Clone(usual)
	odd[3].Bytes++
	packets := []packet{
		{"usual", hookOf(nil, "docker0", both, accepted, usual...), "TRACE: filter:INPUT:rule:1 IN=docker0 OUT=eth0 "},
		{"marked", hookOf(func(p *pkt) { p.Mark = 9 }, "docker0", both, accepted, usual...), " MARK=0x9 "},
		{"longer", hookOf(func(p *pkt) { p.Len = 1000 }, "docker0", both, accepted, longer...), "filter:INPUT:rule:1 "},
		{"counted with another", hookOf(nil, "docker0", both, accepted, odd...), "do not fit one packet"},
		{"from elsewhere", hookOf(func(p *pkt) { p.Data[13] = 99 }, "docker0", both, accepted, usual...), "SRC=10.99."},
		{"from where the rules do not match", hookOf(func(p *pkt) { p.Data[12] = 11 }, "docker0", both, accepted, usual...), "does not fit the conditions"},
		{"of another protocol", hookOf(func(p *pkt) { p.Data[9] = 6 }, "docker0", both, accepted, usual...), "PROTO=TCP"},
		{"not IPv4", hookOf(func(p *pkt) { p.Ethertype = 0x88cc }, "docker0", both, accepted, usual...), "filter:INPUT:rule:1 "},
		{"dropped", hookOf(nil, "docker0", both, dropped, usual...), "filter:INPUT:rule:1 "},
		{"another device", hookOf(nil, "eth7", both, accepted, usual...), " IN=eth7 "},
		{"the table was replaced", hookOf(nil, "docker0", []bpf.NftraceHookTable{other, mangle}, accepted,
			hit(1, 0, 1), hit(1, 1, 1), hit(1, 2, 1), hit(0, 0, 1), hit(0, 1, 1), hit(0, 5, 1), hit(0, 6, 1), hit(0, 3, 1)), "filter:INPUT:rule:2 "},
		{"the table was replaced, the same rules counted", hookOf(nil, "docker0", []bpf.NftraceHookTable{other, mangle}, accepted, usual...), "unresolved"},
		{"a target that nobody knows", hookOf(nil, "docker0", []bpf.NftraceHookTable{filter, opaque}, accepted, opaqueHits...), "filter:INPUT:rule:1 "},
		{"ambiguous", hookOf(nil, "docker0", []bpf.NftraceHookTable{ambiguous}, accepted, hit(0, 0, 1), hit(0, 1, 1), hit(0, 4, 1), hit(0, 6, 2), hit(0, 2, 1)), "more than one path"},
		{"no rule looks at the packet", hookOf(nil, "docker0", []bpf.NftraceHookTable{open}, accepted, hit(0, 0, 1), hit(0, 1, 1)), "filter:INPUT:rule:1 "},
		{"no rule looks at the packet, from elsewhere", hookOf(func(p *pkt) { p.Data[12] = 11 }, "docker0", []bpf.NftraceHookTable{open}, accepted, hit(0, 0, 1), hit(0, 1, 1)), "SRC=11."},
		{"no rule looks at the packet, dropped", hookOf(nil, "docker0", []bpf.NftraceHookTable{open}, dropped, hit(0, 0, 1), hit(0, 1, 1)), "filter:INPUT:rule:1 "},
	}
	for format, renderer := range formats {
		t.Run(format, func(t *testing.T) {
			want := map[string]string{}
			for _, p := range packets {
				one := newPlayer(t, renderer)
				know(one)
				one.anew = true
				want[p.name] = one.play(p.records)
				if format == "trace" && !strings.Contains(want[p.name], p.has) {
					t.Errorf("void: %s: no %q in\n%s", p.name, p.has, want[p.name])
				}
			}
			all := newPlayer(t, renderer)
			know(all)
			for _, first := range packets {
				for _, second := range packets {
					for _, p := range []packet{first, second, first} {
						got := strings.TrimPrefix(all.play(p.records), "\n") // between trees
						if got != want[p.name] {
							t.Fatalf("%s, among %s and %s:\n got %s\nwant %s", p.name, first.name, second.name, got, want[p.name])
						}
					}
				}
			}
		})
	}
}

// What was not known is not kept.
func TestKnownLater(t *testing.T) {
	p := newPlayer(t, formats["trace"])
	table := tableOf(0xc000, 0, "filter") // nobody can ask for generation 0
	records := hookOf(nil, "docker0", []bpf.NftraceHookTable{table}, bpf.NftraceRecTypeREC_XMIT,
		bpf.NftraceHit{Packets: 1, Bytes: 84}, bpf.NftraceHit{Index: 1, Packets: 1, Bytes: 84})
	for range 2 {
		if got := p.play(records); !strings.Contains(got, ":unresolved: ") {
			t.Fatalf("got %s", got)
		}
	}
	if p.s.res.unresolved != 2 {
		t.Errorf("%d unresolved, want 2", p.s.res.unresolved)
	}
	p.s.res.tables.keep(&ruleset{id: events.TableID{Private: table.Private}, table: namedTable(t, "filter", []rule{{cond: true}}, nil)})
	if got := p.play(records); !strings.Contains(got, "TRACE: filter:INPUT:rule:1 ") {
		t.Errorf("got %s", got)
	}
}

// Parts are found again: for another packet's addresses only where no rule looks at them.
func TestPartsAreFound(t *testing.T) {
	from := func(last byte) *events.Part {
		p := &events.Part{Before: *pkt(0, 64), Verdict: events.NFAccept}
		p.Before.Data = bytes.Clone(p.Before.Data)
		p.Before.Data[15] = last
		return p
	}
	run := func(looked bool) []tableRun { return []tableRun{{path: &knownPath{looked: looked}}} }
	var all knownParts
	all.keep(from(1), run(true))
	all.keep(from(2), []tableRun{{path: &knownPath{looked: true}}, {}}) // unresolved
	if all.find(from(1)) == nil || all.find(from(2)) != nil || all.find(from(3)) != nil {
		t.Error("a part is found by addresses that are not its own")
	}
	all.keep(from(1), run(false))
	dropped := from(3)
	dropped.Verdict = events.NFDrop
	if all.find(from(3)) == nil || all.find(dropped) != nil || all.find(&events.Part{Verdict: events.NFAccept}) != nil {
		t.Error("a part is not found by its verdict")
	}
}

// All that rules look at is in a part's key.
func TestPartKey(t *testing.T) {
	v4 := func(change func(b []byte)) *events.Part {
		p := &events.Part{Before: *pkt(0, 64)}
		change(p.Before.Data)
		return p
	}
	v6 := func(change func(b []byte)) *events.Part {
		b := make([]byte, 48)
		b[0], b[6], b[40] = 0x60, 44, 17
		change(b)
		return &events.Part{Before: events.Packet{Family: events.PFIPv6, Data: b}}
	}
	arp := func(change func(b []byte)) *events.Part {
		p := &events.Part{Before: *arpPacket()}
		change(p.Before.Data)
		return p
	}
	parts := map[string]*events.Part{
		"ARP":              arp(func([]byte) {}),
		"ARP opcode":       arp(func(b []byte) { b[7]++ }),
		"ARP sender's MAC": arp(func(b []byte) { b[8]++ }),
		"ARP sender":       arp(func(b []byte) { b[17]++ }),
		"ARP target's MAC": arp(func(b []byte) { b[23]++ }),
		"ARP target":       arp(func(b []byte) { b[27]++ }),
		"IPv4":             v4(func([]byte) {}),
		"source":           v4(func(b []byte) { b[12]++ }),
		"destination":      v4(func(b []byte) { b[19]++ }),
		"protocol":         v4(func(b []byte) { b[9]++ }),
		"fragment":         v4(func(b []byte) { b[7] = 1 }),
		"IPv6":             v6(func([]byte) {}),
		"IPv6 source":      v6(func(b []byte) { b[8]++ }),
		"IPv6 destination": v6(func(b []byte) { b[39]++ }),
		"IPv6 protocol":    v6(func(b []byte) { b[40]++ }),
		"IPv6 fragment":    v6(func(b []byte) { b[43] = 8 }),
		"neither":          {Before: events.Packet{Data: make([]byte, 48)}},
	}
	keys := map[partKey]string{}
	for name, part := range parts {
		k := keyOf(part, verdictOfPart(part))
		if other, ok := keys[k]; ok {
			t.Errorf("%q and %q have the same key", name, other)
		}
		keys[k] = name
	}
	for name, part := range map[string]*events.Part{
		"ARP":     arp(func(b []byte) { b[28] = 9 }),
		"IPv4":    v4(func(b []byte) { b[6], b[8] = 0x40, 9 }),
		"IPv6":    v6(func(b []byte) { b[7] = 9 }),
		"neither": {Before: events.Packet{Family: events.PFIPv6, Data: make([]byte, 39)}},
	} {
		if got := keys[keyOf(part, verdictOfPart(part))]; got != name {
			t.Errorf("%q has the key of %q", name, got)
		}
	}
}

// arpPacket asks for an address, with a byte of padding.
func arpPacket() *events.Packet {
	b := make([]byte, symbolize.ARPLen+1)
	copy(b, []byte{0, 1, 8, 0, 6, 4, 0, 1})
	return &events.Packet{EtherType: etherARP, MACDevType: arphrdEther, Len: len(b), Data: b}
}

// What is kept of a run of arptables is kept for the same packet only, and rules count an ARP
// packet without its padding.
func TestARPRuns(t *testing.T) {
	step := func(change func(p *events.Packet)) *events.Step {
		part := &events.Part{Before: *arpPacket(), After: arpPacket()}
		change(&part.Before)
		return &events.Step{Place: &events.Place{PF: events.PFARP}, Table: &events.TableRun{
			Part: part, Hits: []events.Hit{{Packets: 2, Bytes: 2 * symbolize.ARPLen}},
		}}
	}
	plain := step(func(*events.Packet) {})
	keys := map[string]string{}
	for name, s := range map[string]*events.Step{
		"the packet":   plain,
		"opcode":       step(func(p *events.Packet) { p.Data[7]++ }),
		"sender's MAC": step(func(p *events.Packet) { p.Data[8]++ }),
		"target":       step(func(p *events.Packet) { p.Data[27]++ }),
		"no Ethernet":  step(func(p *events.Packet) { p.MACDevType++ }),
	} {
		key := string(pathKey(nil, s, true))
		if other, ok := keys[key]; ok {
			t.Errorf("%q and %q have the same key", name, other)
		}
		keys[key] = name
	}
	if info, ok := packetInfo(plain); !ok || info.ARP == nil || info.ARP[7] != 1 {
		t.Errorf("%+v, %v", info, ok)
	}
	if !bytesFit(plain) {
		t.Error("the packet's bytes are not taken for its own")
	}
	plain.Table.Hits[0].Bytes++
	if bytesFit(plain) {
		t.Error("another packet's bytes are taken for its own")
	}
	if got := family(events.PFARP); got != symbolize.ARP {
		t.Errorf("family %v", got)
	}
}

// Behind IPv6's extension headers that are cut off, the protocol is not known.
func TestPacketInfoCutOff(t *testing.T) {
	for name, tt := range map[string]struct {
		next    byte
		payload []byte
		proto   int
	}{
		"TCP":                   {6, make([]byte, 20), 6},
		"nothing behind":        {60, nil, -1},
		"options and UDP":       {0, append([]byte{17}, make([]byte, 15)...), 17},
		"routing, cut":          {43, append([]byte{6, 14}, make([]byte, 112)...), -1},
		"reserved":              {255, nil, 255},
		"a later fragment":      {44, []byte{60, 0, 1, 0, 0, 0, 0, 7}, 60},
		"no header behind it":   {44, []byte{60, 0, 0, 1, 0, 0, 0, 7}, -1},
		"authentication, short": {51, make([]byte, 7), -1},
	} {
		b := append(make([]byte, 40), tt.payload...)
		b[0], b[6], b[23], b[39] = 0x60, tt.next, 1, 2
		s := &events.Step{Place: &events.Place{PF: events.PFIPv6}, Table: &events.TableRun{
			Part: &events.Part{Before: events.Packet{Family: events.PFIPv6, Data: b}},
		}}
		if info, ok := packetInfo(s); !ok || info.Proto != tt.proto {
			t.Errorf("%s: %+v, want %d", name, info, tt.proto)
		}
	}
}
