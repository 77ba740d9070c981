package main

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

func mark(value, mask uint32) rule {
	return rule{target: "MARK", rev: 2, data: binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, value), mask)}
}

func ttl(mode, n byte) rule { return rule{target: "TTL", data: []byte{mode, n, 0, 0}} }

func data(hops byte) []byte {
	b := make([]byte, 20)
	b[0], b[8], b[9] = 0x45, hops, 1
	copy(b[12:], netip.MustParseAddr("10.0.0.1").AsSlice())
	copy(b[16:], netip.MustParseAddr("10.0.0.2").AsSlice())
	return b
}

// packetRule is a rule's packet: what is expected of it.
type packetRule struct {
	mark   uint32
	ttl    byte
	unsure string // a part of it
}

// not is a packet that is not known.
func not(why string) packetRule { return packetRule{unsure: why} }

func checkPackets(t *testing.T, run *events.TableRun, want []packetRule) {
	t.Helper()
	for i, w := range want {
		pkt, unsure := run.Packet(i)
		if w.unsure != "" {
			if pkt != nil || !strings.Contains(unsure, w.unsure) {
				t.Errorf("rule %d: %+v, %q, want unsure because of %s", i+1, pkt, unsure, w.unsure)
			}
			continue
		}
		if pkt == nil || unsure != "" {
			t.Errorf("rule %d: %+v, %q", i+1, pkt, unsure)
		} else if pkt.Mark != w.mark || pkt.Data[8] != w.ttl {
			t.Errorf("rule %d: mark %#x ttl %d, want %#x %d", i+1, pkt.Mark, pkt.Data[8], w.mark, w.ttl)
		}
	}
}

// runOf is a run through rules and the policy behind them; nil rules: unresolved.
func runOf(t *testing.T, name string, part *events.Part, verdict int, rules []rule) tableRun {
	t.Helper()
	step := &events.Step{Place: &events.Place{Hook: events.HookLocalIn}, Kind: events.StepTable, Verdict: verdict,
		Table: &events.TableRun{Name: name, Part: part, Before: &part.Before}}
	if rules == nil {
		step.Table.Unresolved = "for some reason"
		return tableRun{step: step}
	}
	for i := range rules {
		rules[i].cond = rules[i].target != "DROP" // else those behind it are dead
	}
	table := namedTable(t, name, rules, nil)
	path := &symbolize.Path{}
	last := len(rules)
	if verdict == events.NFDrop {
		last--
	}
	k := &knownPath{Path: path}
	for i := range last + 1 {
		path.Visits = append(path.Visits, symbolize.Visit{Index: i})
		k.modifies = k.modifies || table.Entries[i].Modifies()
	}
	step.Table.Rules = make([]events.Rule, last+1)
	return tableRun{step: step, table: table, path: k}
}

var unknownTarget = rule{target: "NOBODYKNOWS"}

// Each rule gets the packet as it was before its own target ran.
func TestPacketsOf(t *testing.T) {
	const accept, drop = events.NFAccept, events.NFDrop
	for _, tt := range []struct {
		name    string
		rules   []rule
		verdict int
		after   *events.Packet // when it was seen next; nil: gone
		want    []packetRule
		left    bool // the packet is known behind the table
	}{
		{"nothing changes", []rule{{}, {target: "LOG"}}, accept, pkt(0, 63), []packetRule{{0, 64, ""}, {0, 64, ""}, {0, 64, ""}}, true},
		{"one mark", []rule{{}, mark(7, 0xffffffff)}, accept, pkt(7, 63), []packetRule{{0, 64, ""}, {0, 64, ""}, {7, 64, ""}}, true},
		{"marks add up", []rule{mark(0x10, 0xf0), mark(0x01, 0x0f), mark(0x20, 0x20)}, accept, pkt(0x31, 64),
			[]packetRule{{0, 64, ""}, {0x10, 64, ""}, {0x11, 64, ""}, {0x31, 64, ""}}, true},
		{"ttl", []rule{ttl(2, 3), ttl(0, 9)}, accept, pkt(0, 8), []packetRule{{0, 64, ""}, {0, 61, ""}, {0, 9, ""}}, true},
		{"mark and ttl, dropped", []rule{mark(1, 0xffffffff), ttl(1, 1), {target: "DROP"}}, drop, nil,
			[]packetRule{{0, 64, ""}, {1, 64, ""}, {1, 65, ""}}, false},
		// What is known needs no look at the packet behind.
		{"not seen behind", []rule{mark(7, 0xffffffff)}, accept, nil, []packetRule{{0, 64, ""}, {7, 64, ""}}, true},
		// The last that changes it left what was seen behind, but for the TTL.
		{"unknown, but the last", []rule{mark(1, 0xffffffff), unknownTarget}, accept, pkt(5, 63), []packetRule{{0, 64, ""}, {1, 64, ""}, {5, 64, ""}}, true},
		{"unknown, behind a TTL", []rule{ttl(0, 9), unknownTarget}, accept, pkt(5, 8), []packetRule{{0, 64, ""}, {0, 9, ""}, {5, 9, ""}}, true},
		{"unknown, before a TTL", []rule{unknownTarget, ttl(2, 3)}, accept, pkt(5, 60), []packetRule{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}, {5, 61, ""}}, true},
		{"unknown, and gone", []rule{unknownTarget, {target: "DROP"}}, drop, nil, []packetRule{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}}, false},
		{"unknown, and not seen", []rule{unknownTarget}, accept, nil, []packetRule{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}}, false},
		{"unknown, and then in a tunnel", []rule{unknownTarget}, accept, inTunnel(), []packetRule{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}}, false},
		{"unknown in the middle", []rule{unknownTarget, {}, mark(1, 0xffffffff)}, accept, pkt(1, 64),
			[]packetRule{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}, {0, 0, "NOBODYKNOWS"}, {1, 64, ""}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := &events.Part{Before: *pkt(0, 64), Verdict: tt.verdict}
			part.After = tt.after
			run := runOf(t, "filter", part, tt.verdict, tt.rules)
			packetsOf([]tableRun{run}, nil)
			table := run.step.Table
			checkPackets(t, table, tt.want)
			last, _ := table.Packet(len(table.Rules) - 1)
			if left := table.After != nil; left != tt.left {
				t.Errorf("behind the table: %+v", table.After)
			} else if left && (table.After.Mark != last.Mark || !bytes.Equal(table.After.Data, last.Data)) {
				t.Errorf("behind the table: %+v, at its last rule %+v", table.After, last)
			}
			if part.Before.Mark != 0 || part.Before.Data[8] != 64 || tt.after != nil && part.After.Data[8] != tt.after.Data[8] {
				t.Error("the part's packets were changed")
			}
		})
	}
}

// TPROXY gives the packet a mark, and a socket, whose owner is seen behind the hook only.
func TestPacketsOfTPROXY(t *testing.T) {
	rules := []rule{{target: "TPROXY", rev: 1, data: binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 0xff), 5)}}
	for _, tt := range []struct {
		name   string
		after  func(*events.Part)
		unsure bool
	}{
		{"seen", func(p *events.Part) { p.After = pkt(5, 64); p.After.HasOwner, p.After.UID = true, 7 }, false},
		{"not changed, as it seems", func(p *events.Part) { p.After = &p.Before }, true},
		{"gone", func(*events.Part) {}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := &events.Part{Before: *pkt(0, 64), Verdict: events.NFAccept}
			tt.after(part)
			runs := []tableRun{runOf(t, "mangle", part, events.NFAccept, rules), runOf(t, "nat", part, events.NFAccept, []rule{{}})}
			packetsOf(runs, nil)
			if p, _ := runs[0].step.Table.Packet(0); p == nil || p.Mark != 0 || p.HasOwner {
				t.Errorf("TPROXY met %+v", p)
			}
			switch p, unsure := runs[1].step.Table.Packet(0); {
			case tt.unsure && !strings.Contains(unsure, "TPROXY"), !tt.unsure && unsure != "":
				t.Errorf("unsure %q", unsure)
			case !tt.unsure && (p.Mark != 5 || !p.HasOwner || p.UID != 7):
				t.Errorf("nat met %+v", p)
			}
		})
	}
}

func inTunnel() *events.Packet {
	p := pkt(0, 64)
	p.Data[9] = 4
	return p
}

// The packet goes through all tables of a part.
func TestPacketsOfPart(t *testing.T) {
	var (
		one     = []rule{mark(1, 0xffffffff)}
		plain   = []rule{{}}
		unknown = []rule{unknownTarget}
	)
	keep := func(p packetRule) []packetRule { return []packetRule{p, p} }
	at := func(mark uint32, ttl byte) packetRule { return packetRule{mark, ttl, ""} }
	for _, tt := range []struct {
		name           string
		mangle, filter []rule // nil: unresolved
		after          *events.Packet
		afterNAT       bool
		first, second  []packetRule
		before, behind int // the mark before and behind table filter; -1: not known
	}{
		{"marked by the first", one, plain, pkt(1, 63), false, []packetRule{at(0, 64), at(1, 64)}, keep(at(1, 64)), 1, 1},
		{"marked by the second", plain, one, pkt(1, 63), false, keep(at(0, 64)), []packetRule{at(0, 64), at(1, 64)}, 0, 1},
		{"unknown, the last of all", unknown, plain, pkt(5, 63), false, []packetRule{at(0, 64), at(5, 64)}, keep(at(5, 64)), 5, 5},
		{"unknown, not the last", unknown, one, pkt(1, 63), false, []packetRule{at(0, 64), not("NOBODYKNOWS")},
			[]packetRule{not("NOBODYKNOWS"), at(1, 64)}, 0, 1},
		{"unknown, and not seen behind", unknown, one, nil, false, []packetRule{at(0, 64), not("NOBODYKNOWS")}, keep(not("NOBODYKNOWS")), 0, -1},
		{"the first is unresolved", nil, one, pkt(1, 63), false, nil, keep(not("table mangle")), 0, -1},
		{"the second is unresolved", unknown, nil, pkt(1, 63), false, []packetRule{at(0, 64), not("NOBODYKNOWS")}, nil, 0, -1},
		{"the second is unresolved, the first known", one, nil, pkt(7, 63), false, []packetRule{at(0, 64), at(1, 64)}, nil, 1, -1},
		{"behind NAT", plain, plain, nil, true, keep(at(0, 64)), keep(at(0, 64)), 0, 0},
		{"behind NAT, marked", one, plain, nil, true, []packetRule{not("seen only behind"), at(0, 64)}, keep(at(0, 64)), 0, 0},
		{"behind NAT, marked twice", one, one, nil, true, keep(not("seen only behind")), []packetRule{not("seen only behind"), at(0, 64)}, 0, 0},
		{"behind NAT, the second is unresolved", plain, nil, nil, true, keep(not("seen only behind")), nil, 0, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := &events.Part{Before: *pkt(0, 64), AfterNAT: tt.afterNAT, Verdict: events.NFAccept}
			part.After = tt.after
			runs := []tableRun{
				runOf(t, "mangle", part, events.NFAccept, tt.mangle),
				runOf(t, "filter", part, events.NFAccept, tt.filter),
			}
			filter := runs[1].step.Table
			filter.SetBefore(filter.Before, "NEW", false)
			packetsOf(runs, nil)
			checkPackets(t, runs[0].step.Table, tt.first)
			checkPackets(t, filter, tt.second)
			if filter.Before.CT != "NEW" || filter.Before.Mark != uint32(tt.before) {
				t.Errorf("before the second: %+v, want NEW and mark %d", filter.Before, tt.before)
			}
			if known := filter.After != nil; known != (tt.behind >= 0) || known && filter.After.Mark != uint32(tt.behind) {
				t.Errorf("behind the second: %+v, want mark %d", filter.After, tt.behind)
			}
		})
	}
	// Gone behind NAT before it was seen there.
	part := &events.Part{AfterNAT: true, Verdict: events.NFDrop}
	run := runOf(t, "filter", part, events.NFDrop, []rule{mark(1, 1), {target: "DROP"}})
	packetsOf([]tableRun{run}, nil)
	checkPackets(t, run.step.Table, keep(not("not seen")))
}

// Behind NAT the packet is seen at the part's end only. MARK is told all the same, from the mark
// that it had before NAT, if that comes to the one that was seen.
func TestPacketsOfMarkBehindNAT(t *testing.T) {
	not := packetRule{0, 0, "seen only behind"}
	nft := func(part *events.Part) []events.Step {
		return []events.Step{*nftStepOf(part, nativeTable, baseChain, didPolicy(events.NFAccept))}
	}
	plain := rule{cond: true}
	for _, tt := range []struct {
		name  string
		known bool // all that nf_tables did
		nft   bool // it ran, too
		rules []rule
		seen  uint32
		want  []packetRule
	}{
		{"marked", true, false, []rule{mark(1, 0xf), {}}, 0x11, []packetRule{{0x10, 64, ""}, {0x11, 64, ""}, {0x11, 64, ""}}},
		{"marked twice", true, false, []rule{mark(1, 0xf), mark(0x20, 0xff)}, 0x20, []packetRule{{0x10, 64, ""}, {0x11, 64, ""}, {0x20, 64, ""}}},
		{"marked as it was", true, false, []rule{mark(0x10, 0xff)}, 0x10, []packetRule{{0x10, 64, ""}, {0x10, 64, ""}}},
		{"perhaps by others", false, false, []rule{mark(1, 0xf)}, 0x11, []packetRule{not, {0x11, 64, ""}}},
		{"perhaps by others, as it was", false, false, []rule{mark(0x10, 0xff)}, 0x10, []packetRule{not, {0x10, 64, ""}}},
		{"another mark behind", true, false, []rule{mark(1, 0xf)}, 0x21, []packetRule{not, {0x21, 64, ""}}},
		{"more than the mark", true, false, []rule{mark(1, 0xf), ttl(2, 3)}, 0x11, []packetRule{not, not, {0x11, 64, ""}}},
		{"by nobody", true, false, []rule{plain}, 0x10, []packetRule{{0x10, 64, ""}, {0x10, 64, ""}}},
		{"by nobody known", true, false, []rule{plain}, 0x11, []packetRule{not, not}},
		// nf_tables may have set it, too, and MARK have overwritten that.
		{"beside nf_tables", true, true, []rule{plain, mark(5, 0xff)}, 5, []packetRule{not, not, {5, 64, ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := &events.Part{Before: *pkt(0x10, 64), AfterNAT: true, MarkKnown: tt.known, Verdict: events.NFAccept}
			if tt.seen != part.Before.Mark {
				part.End = pkt(tt.seen, 64)
			}
			var others []events.Step
			if tt.nft {
				others = nft(part)
			}
			run := runOf(t, "filter", part, events.NFAccept, tt.rules)
			packetsOf([]tableRun{run}, others)
			checkPackets(t, run.step.Table, tt.want)
			table := run.step.Table
			if table.Before.Mark != 0x10 || part.Before.Mark != 0x10 {
				t.Errorf("before: mark %#x, the part's %#x", table.Before.Mark, part.Before.Mark)
			}
			sure := tt.want[len(tt.want)-1].unsure == ""
			if known := table.After != nil; known != sure || known && table.After.Mark != tt.seen {
				t.Errorf("behind it: %+v, want mark %#x %v", table.After, tt.seen, sure)
			}
		})
	}
}

// Tables behind nat met another destination where the kernel skipped NAT's probe.
func TestPacketsOfUnseenNAT(t *testing.T) {
	const skipped = "skipped the probe of NAT"
	dnat := []rule{{target: "DNAT"}}
	natted := func(mark uint32) *events.Packet {
		p := pkt(mark, 64)
		p.Data[19] = 9
		return p
	}
	for _, tt := range []struct {
		name        string
		hook        uint8
		nat, filter []rule
		part        events.Part
		want        byte // the last byte of the destination at each rule of filter
		unsure      string
	}{
		{"seen behind", events.HookLocalOut, dnat, []rule{{}}, events.Part{NATUnseen: true, After: natted(0)}, 9, ""},
		{"without a rule of nat", events.HookLocalOut, []rule{{}}, []rule{{}}, events.Part{NATUnseen: true, After: natted(0)}, 9, ""},
		{"changed behind NAT", events.HookLocalOut, dnat, []rule{mark(1, 1)}, events.Part{NATUnseen: true, After: natted(1)}, 0, skipped},
		{"not seen behind", events.HookLocalOut, dnat, []rule{{}}, events.Part{Unseen: true}, 0, skipped},
		{"not seen, but no NAT", events.HookLocalOut, []rule{{}}, []rule{{}}, events.Part{Unseen: true}, 2, ""},
		{"not changed", events.HookLocalOut, dnat, []rule{{}}, events.Part{}, 2, ""},
		{"its source", events.HookPostRouting, []rule{{target: "SNAT"}}, []rule{{}}, events.Part{Unseen: true}, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := tt.part
			part.Before, part.Verdict = *pkt(0, 64), events.NFAccept
			runs := []tableRun{runOf(t, "nat", &part, events.NFAccept, tt.nat), runOf(t, "filter", &part, events.NFAccept, tt.filter)}
			for _, r := range runs {
				r.step.Hook = tt.hook
			}
			// runOf goes on to the policy, and DNAT ends the run.
			if tt.nat[0].target != "" {
				runs[0].path.Visits = runs[0].path.Visits[:1]
				runs[0].step.Table.Rules = runs[0].step.Table.Rules[:1]
			}
			packetsOf(runs, nil)
			if p, _ := runs[0].step.Table.Packet(0); p == nil || p.Data[19] != 2 {
				t.Errorf("nat met %+v", p)
			}
			p, unsure := runs[1].step.Table.Packet(0)
			if !strings.Contains(unsure, tt.unsure) || (unsure == "") != (tt.unsure == "") {
				t.Errorf("filter: unsure %q, want %q", unsure, tt.unsure)
			}
			if tt.unsure == "" && p.Data[19] != tt.want {
				t.Errorf("filter met %+v", p)
			}
			if info, ok := packetInfo(runs[1].step); ok && part.NATUnseen && info.Dst != netip.MustParseAddr("10.0.0.9") {
				t.Errorf("rules of filter are held against %v", info.Dst)
			}
		})
	}
}

// What was seen behind NAT does not tell how the packet was before it.
func TestPacketsOfBeforeUnseenNAT(t *testing.T) {
	part := &events.Part{Before: *pkt(0, 64), Verdict: events.NFAccept, NATUnseen: true, After: pkt(5, 64)}
	part.After.Data[19] = 9
	runs := []tableRun{
		runOf(t, "mangle", part, events.NFAccept, []rule{unknownTarget}),
		runOf(t, "nat", part, events.NFAccept, []rule{{}}),
		runOf(t, "filter", part, events.NFAccept, []rule{{}}),
	}
	for i := range runs {
		runs[i].step.Hook = events.HookLocalOut
	}
	packetsOf(runs, nil)
	for _, r := range runs[1:] {
		checkPackets(t, r.step.Table, []packetRule{not("NOBODYKNOWS")})
	}
}

// A table that cannot be resolved leaves the packet alone if none of the rules that
// matched can change it.
func TestOpaque(t *testing.T) {
	table := inputTable(t, []rule{{cond: true, target: "LOG"}, mark(1, 1)}, nil)
	for _, tt := range []struct {
		table *symbolize.Table
		hits  []events.Hit
		want  bool
	}{
		{nil, hits(0, 1), true},
		{table, nil, true},
		{table, hits(0, 1, 2, 1), false},
		{table, hits(0, 1, 1, 1), true},
		{table, hits(99, 1), true},
	} {
		run := tableRun{step: aRun(tt.hits), table: tt.table}
		if got := run.opaque(); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.hits, got, tt.want)
		}
	}
}

func TestBehind(t *testing.T) {
	p, after := pkt(1, 64), pkt(2, 63)
	p.MAC, after.MAC = []byte{1}, []byte{2}
	setChecksum(p.Data)
	setChecksum(after.Data)
	next := behind(p, after)
	if next == nil || next.Mark != 2 || next.MAC[0] != 1 || !bytes.Equal(next.Data, p.Data) {
		t.Errorf("got %+v, want the packet with the mark", next)
	}
	if sum := p.Data[10:12]; sum[0] != 0x66 || sum[1] != 0xfb {
		// 4500 0000 0000 0000 4001 .... 0a00 0001 0a00 0002
		t.Errorf("checksum %x", sum)
	}
	for name, change := range map[string]func(p *events.Packet){
		"another protocol": func(p *events.Packet) { p.Data[9] = 50 },
		"a fragment":       func(p *events.Packet) { p.Data[6] = 0x20 },
		"a later fragment": func(p *events.Packet) { p.Data[7] = 1 },
		"cut off":          func(p *events.Packet) { p.Data = p.Data[:19] },
		"not seen":         func(p *events.Packet) { *p = events.Packet{} },
		"another family":   func(p *events.Packet) { p.Family = events.PFIPv6 },
	} {
		after := pkt(2, 63)
		change(after)
		if got := behind(pkt(1, 64), after); got != nil {
			t.Errorf("%s: taken: %+v", name, got)
		}
	}
	v6 := func(hops byte) *events.Packet {
		b := make([]byte, 40)
		b[0], b[6], b[7] = 0x60, 17, hops
		return &events.Packet{Family: events.PFIPv6, Data: b}
	}
	if got := behind(v6(64), v6(63)); got == nil || got.Data[7] != 64 || got.Data[10] != 0 {
		t.Errorf("IPv6: %+v", got)
	}
}

func pkt(mark uint32, hops byte) *events.Packet {
	return &events.Packet{Family: events.PFIPv4, Len: 20, Mark: mark, Data: data(hops)}
}

// aRun is a run of the table in a packet's only part.
func aRun(hs []events.Hit) *events.Step {
	part := &events.Part{Before: events.Packet{Len: 84, Data: []byte{}}, After: &events.Packet{Len: 84, Data: []byte{}}, Verdict: events.NFAccept}
	return &events.Step{
		Place: &events.Place{Netns: 77, PF: events.PFIPv4, Hook: events.HookLocalIn},
		Kind:  events.StepTable, CPU: 1, Verdict: events.NFAccept,
		Table: &events.TableRun{
			Name: "filter", ID: events.TableID{Private: 0xabc, Gen: 3}, Hits: hs,
			Before: &part.Before, Part: part,
		},
	}
}

// walk takes hits for what they are only if they fit one packet.
func TestWalkChecksCounters(t *testing.T) {
	table := inputTable(t, []rule{{cond: true, target: "jump U"}}, []rule{{cond: true, target: "ACCEPT"}})
	for _, tt := range []struct {
		hits []events.Hit
		want string // a part of the error
	}{
		{hits(1, 1), ""},
		{hits(0, 1, 3, 1), ""},
		{hits(0, 1, 1, 1, 4, 1), ""},
		{hits(0, 1, 1, 1), "no path"},
		{hits(1, 2), "no path"},
		{[]events.Hit{{Index: 1, Packets: 1, Bytes: 85}}, "do not fit one packet"},
		{hits(99, 1), "entries, the counters more"},
	} {
		_, _, _, err := walk(table, aRun(tt.hits), true)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%v: %v, want %q", tt.hits, err, tt.want)
		}
	}
	// The table's own targets may have made it longer; of a packet that is gone nobody knows.
	longer := []events.Hit{{Index: 1, Packets: 1, Bytes: 100}}
	for _, after := range []*events.Packet{{Len: 100, Data: []byte{}}, nil} {
		step := aRun(longer)
		step.Table.Part.After = after
		if _, _, _, err := walk(table, step, true); err != nil {
			t.Errorf("%+v: %v", after, err)
		}
	}
}

// The verdict of the last table, from its rules and from what became of the packet.
func TestWalkVerdict(t *testing.T) {
	const accept, drop, unknown = events.NFAccept, events.NFDrop, events.VerdictUnknown
	ext := func(name string) rule { return rule{cond: true, target: name} }
	sctp := rule{cond: true, target: "ACCEPT", match: "sctp"}
	tcp := rule{cond: true, target: "ACCEPT", match: "tcp"}
	for _, tt := range []struct {
		name         string
		rule         rule
		hits         []events.Hit
		step, part   int
		want         int
		hotdrop, err bool
	}{
		{"dropped by the rule", rule{cond: true, target: "DROP"}, hits(0, 1), unknown, drop, drop, false, false},
		{"accepted by the rule, dropped behind", rule{cond: true, target: "ACCEPT"}, hits(0, 1), unknown, drop, accept, false, false},
		{"accepted, and no match of the rule did it", sctp, hits(0, 1), unknown, drop, accept, false, false},
		{"a match dropped it", tcp, hits(), unknown, drop, drop, true, false},
		{"known that a match dropped it", tcp, hits(), drop, drop, drop, true, false},
		{"accepted, but the rule drops", rule{cond: true, target: "DROP"}, hits(0, 1), accept, accept, accept, false, true},
		{"accepted by the policy", rule{cond: true}, hits(0, 1, 1, 1), unknown, unknown, accept, false, false},
		{"gone, and the rule drops", rule{cond: true, target: "DROP"}, hits(0, 1), unknown, unknown, drop, false, false},
		{"no path at all", rule{cond: true}, hits(0, 1), unknown, unknown, unknown, false, true},
		{"REJECT", ext("REJECT"), hits(0, 1), unknown, drop, drop, false, false},
		{"REJECT, gone", ext("REJECT"), hits(0, 1), unknown, unknown, drop, false, false},
		{"NFQUEUE, not seen again", ext("NFQUEUE"), hits(0, 1), unknown, unknown, events.NFQueue, false, false},
		{"NFQUEUE, came back", ext("NFQUEUE"), hits(0, 1), accept, accept, events.NFQueue, false, false},
		{"QUEUE", rule{cond: true, target: "QUEUE"}, hits(0, 1), unknown, unknown, events.NFQueue, false, false},
		{"QUEUE, came back", rule{cond: true, target: "QUEUE"}, hits(0, 1), accept, accept, events.NFQueue, false, false},
		{"SYNPROXY kept it", ext("SYNPROXY"), hits(0, 1), unknown, unknown, events.NFStolen, false, false},
		{"SYNPROXY dropped it", ext("SYNPROXY"), hits(0, 1), unknown, drop, drop, false, false},
		{"a target nobody knows kept it", ext("NOBODYKNOWS"), hits(0, 1), unknown, unknown, accept, false, false},
		{"DNAT", ext("DNAT"), hits(0, 1), accept, accept, accept, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := inputTable(t, []rule{tt.rule}, nil)
			step := aRun(tt.hits)
			step.Verdict, step.Table.Part.Verdict = tt.step, tt.part
			path, verdict, _, err := walk(table, step, true)
			if (err != nil) != tt.err || verdict != tt.want {
				t.Fatalf("verdict %d, %v, want %d", verdict, err, tt.want)
			}
			if err == nil && (path.Hotdrop != "") != tt.hotdrop {
				t.Errorf("hotdrop %q", path.Hotdrop)
			}
		})
	}
}

// Which rule it was may be unknown where the verdict is not.
func TestAmbiguousVerdict(t *testing.T) {
	table := inputTable(t, []rule{{cond: true, target: "jump U"}, {cond: true, target: "jump U"}},
		[]rule{{target: "LOG", match: "limit"}, {target: "DROP", match: "limit"}})
	// U is entered twice, its first rule matched once.
	j := journeyOf(events.NFDrop, &events.Part{Before: *pkt(0, 64)}, hits(0, 1, 1, 1, 4, 1, 5, 1, 6, 1))
	resolverOf(table).journey(j)
	s := j.Steps[0]
	if !strings.Contains(s.Table.Unresolved, "more than one path") || s.Verdict != events.NFDrop {
		t.Errorf("verdict %d, %q", s.Verdict, s.Table.Unresolved)
	}
	if o := j.Outcome; o.Kind != events.OutDropped || o.Step != 0 || o.Rule != -1 {
		t.Errorf("outcome %+v", o)
	}
}

// resolverOf knows these tables; IDs are numbered from 1.
func resolverOf(tables ...*symbolize.Table) *resolver {
	r := newResolver(nil, newRulesets(nil, nil, &speaker{}), nil, nil, false)
	r.names[77] = "c1"
	for i, table := range tables {
		id := events.TableID{Private: 1, Gen: uint64(i + 1)}
		r.tables.keep(&ruleset{family: symbolize.IPv4, table: table, id: id})
	}
	return r
}

// journeyOf is a journey of one hook, its tables with these hits.
func journeyOf(verdict int, part *events.Part, hs ...[]events.Hit) *events.Journey {
	j := &events.Journey{}
	part.Verdict = verdict
	for i, h := range hs {
		s := aRun(h)
		s.Table.Part, s.Table.Before = part, &part.Before
		s.Table.ID = events.TableID{Private: 1, Gen: uint64(i + 1)}
		if verdict != events.NFAccept && i == len(hs)-1 {
			s.Verdict = events.VerdictUnknown
		}
		j.Steps = append(j.Steps, *s)
	}
	j.Steps = append(j.Steps, events.Step{Place: aRun(nil).Place, Kind: events.StepHook, Verdict: verdict})
	j.Conclude()
	return j
}

// What is kept of parts like it does not tell when the mark changed that a part behind NAT ended with.
func TestKnownPartMarkedBehindNAT(t *testing.T) {
	r := resolverOf(namedTable(t, "mangle", []rule{{cond: true}}, nil))
	pattern := &events.Pattern{}
	for _, tt := range []struct {
		end  *events.Packet
		want packetRule
	}{
		{nil, packetRule{0, 64, ""}},
		{pkt(5, 64), packetRule{0, 0, "seen only behind"}},
		{nil, packetRule{0, 64, ""}},
	} {
		part := &events.Part{Before: *pkt(0, 64), AfterNAT: true, MarkKnown: true, End: tt.end, Pattern: pattern}
		part.Before.Len = 84
		j := journeyOf(events.NFAccept, part, hits(0, 1, 1, 1))
		r.journey(j)
		checkPackets(t, j.Steps[0].Table, []packetRule{tt.want, tt.want})
	}
	if pattern.Known == nil {
		t.Error("nothing was kept")
	}
}

// A journey's tables are resolved part by part, and its outcome with them.
func TestResolveJourney(t *testing.T) {
	mangle := namedTable(t, "mangle", []rule{markIf(7)}, nil)
	filter := inputTable(t, []rule{{cond: true, target: "DROP"}}, nil)
	packet := func() events.Packet {
		p := *pkt(0, 64)
		p.Len = 84
		return p
	}
	for _, tt := range []struct {
		name         string
		verdict      int
		filter       []events.Hit
		kind         events.OutcomeKind
		step, rule   int
		tableVerdict int
	}{
		{"dropped by the rule", events.NFDrop, hits(0, 1), events.OutDropped, 1, 0, events.NFDrop},
		{"dropped by another", events.NFDrop, hits(1, 1), events.OutDropped, 2, -1, events.NFAccept},
		{"unresolved", events.NFDrop, hits(0, 2), events.OutDropped, 2, -1, events.VerdictUnknown},
		{"accepted", events.NFAccept, hits(1, 1), events.OutUnknown, -1, -1, events.NFAccept},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := resolverOf(mangle, filter)
			for range 2 { // the second time from the cache
				r.unresolved = 0
				j := journeyOf(tt.verdict, &events.Part{Before: packet()}, hits(0, 1, 1, 1), tt.filter)
				r.journey(j)
				if o := j.Outcome; o.Kind != tt.kind || o.Step != tt.step || o.Rule != tt.rule || o.NetnsName != "c1" {
					t.Errorf("outcome %+v", o)
				}
				if v := j.Steps[1].Verdict; v != tt.tableVerdict {
					t.Errorf("table filter returned %d, want %d", v, tt.tableVerdict)
				}
				if tt.name == "unresolved" {
					if r.unresolved != 1 {
						t.Errorf("%d unresolved", r.unresolved)
					}
					continue
				}
				if pkt, _ := j.Steps[1].Table.Packet(0); len(j.Steps[1].Table.Rules) != 1 || pkt == nil || pkt.Mark != 7 || j.Steps[1].Table.Before.Mark != 7 {
					t.Errorf("table filter: %+v, want the mark of table mangle", j.Steps[1].Table)
				}
				for i := range j.Steps {
					if j.Steps[i].NetnsName != "c1" {
						t.Errorf("step %d is in %q", i, j.Steps[i].NetnsName)
					}
				}
			}
		})
	}
}

// The cache keeps apart what walk looks at.
func TestPathKey(t *testing.T) {
	keys := map[string]string{}
	add := func(name string, change func(s *events.Step)) {
		s := aRun(hits(0, 1))
		s.Table.Part.Before = *pkt(0, 64)
		change(s)
		k := string(pathKey(nil, s, name != "not plain"))
		if other, ok := keys[k]; ok {
			t.Errorf("%q and %q have the same key", name, other)
		}
		keys[k] = name
	}
	add("it", func(*events.Step) {})
	add("not plain", func(*events.Step) {})
	add("verdict", func(s *events.Step) { s.Verdict = events.VerdictUnknown })
	add("dropped", func(s *events.Step) { s.Table.Part.Verdict = events.NFDrop })
	add("hits", func(s *events.Step) { s.Table.Hits[0].Packets = 2 })
	add("address", func(s *events.Step) { s.Table.Part.Before.Data[15] = 9 })
	add("device", func(s *events.Step) { s.In.Name = "eth0" })
	add("hook", func(s *events.Step) { s.Hook = events.HookForward })
	add("protocol", func(s *events.Step) { s.Table.Part.Before.Data[9] = 17 })
	add("fragment", func(s *events.Step) { s.Table.Part.Before.Data[7] = 1 })
	add("behind NAT that was not seen", func(s *events.Step) {
		after := pkt(0, 64)
		after.Data[19] = 9
		s.Table.Name, s.Table.Part.NATUnseen, s.Table.Part.After = "filter", true, after
	})
	v6 := func(change func(b []byte)) func(s *events.Step) {
		return func(s *events.Step) {
			b := make([]byte, 48)
			b[0], b[6], b[40] = 0x60, 44, 17
			change(b)
			s.Table.Part.Before = events.Packet{Family: events.PFIPv6, Data: b}
		}
	}
	add("IPv6", v6(func([]byte) {}))
	add("IPv6 address", v6(func(b []byte) { b[23] = 1 }))
	add("IPv6 protocol", v6(func(b []byte) { b[40] = 6 }))
	add("IPv6 fragment", v6(func(b []byte) { b[42] = 1 }))
}

// A path is taken for another's neither where it was the last nor where it is not known.
func TestPathCache(t *testing.T) {
	var c pathCache
	paths := map[string]*knownPath{"a": {}, "b": {}}
	for _, key := range []string{"a", "b"} {
		c.put([]byte(key), paths[key])
	}
	for i, key := range []string{"a", "a", "b", "c", "b", "a"} {
		if got := c.get(1, []byte(key)); got != paths[key] {
			t.Errorf("%d, %s: %p of %v", i, key, got, paths)
		}
	}
	if got := c.get(symbolize.NumHooks, []byte("a")); got != nil {
		t.Errorf("at a hook that there is not: %p", got)
	}
}

// Rulesets that want the same place among the recent ones are told apart.
func TestRecentRulesets(t *testing.T) {
	r := resolverOf()
	one := &ruleset{id: events.TableID{Private: 1, Gen: 7}}
	two := &ruleset{id: events.TableID{Private: 1, Gen: 7 + uint64(len(r.recent))}}
	r.tables.keep(one)
	r.tables.keep(two)
	see := func(id events.TableID) *ruleset {
		return r.see(&events.Step{Place: &events.Place{}, Table: &events.TableRun{ID: id}})
	}
	for i, rs := range []*ruleset{one, one, two, one} {
		if got := see(rs.id); got != rs {
			t.Errorf("%d: %+v, want %+v", i, got, rs)
		}
	}
	if got := see(events.TableID{Private: 2}); got != nil {
		t.Errorf("a ruleset that is not known: %+v", got)
	}
}

// Behind a rule that changed addresses, rules are not held against those the packet had.
func TestPlain(t *testing.T) {
	outside := pkt(0, 64)
	outside.Data[12] = 11 // no rule with a condition fits 11.0.0.1
	outside.Len = 84
	for _, tt := range []struct {
		target string
		want   bool // resolved
	}{{"LOG", false}, {"DNPT", true}, {"", true}} {
		mangle := namedTable(t, "mangle", []rule{{target: tt.target}, {cond: true}}, nil)
		filter := inputTable(t, []rule{{cond: true, target: "ACCEPT"}}, nil)
		r := resolverOf(mangle, filter)
		j := journeyOf(events.NFAccept, &events.Part{Before: *outside}, hits(0, 1, 1, 1, 2, 1), hits(0, 1))
		if tt.target == "" {
			j.Steps[0].Table.Unresolved = "for some reason"
		}
		r.journey(j)
		first, second := j.Steps[0].Table.Unresolved == "", j.Steps[1].Table.Unresolved == ""
		if first != (tt.want && tt.target != "") || second != tt.want {
			t.Errorf("%s: %q, %q", tt.target, j.Steps[0].Table.Unresolved, j.Steps[1].Table.Unresolved)
		}
	}
}

// connmark is the target with a mode: 0 set, 1 save, 2 restore.
func connmark(mode byte, value uint32) rule {
	r := rule{target: "CONNMARK", rev: 1}
	for _, v := range []uint32{value, 0xffffffff, 0xffffffff} {
		r.data = binary.NativeEndian.AppendUint32(r.data, v)
	}
	r.data = append(r.data, mode, 0, 0, 0)
	return r
}

// The mark that a connection's is restored to is told from what is seen of it, before or behind.
func TestRestoredMarks(t *testing.T) {
	const accept = events.NFAccept
	restore, save, five := connmark(2, 0), connmark(1, 0), mark(5, 0xffffffff)
	recipe := []rule{restore, five, save}
	at := func(mark uint32) packetRule { return packetRule{mark, 64, ""} }
	lost := not("CONNMARK")
	tracked := func(mark, conn uint32, state string, confirmed bool) events.Packet {
		p := *pkt(mark, 64)
		p.CT, p.HasCTMark, p.CTMark, p.CTConfirmed = state, true, conn, confirmed
		return p
	}
	before := *pkt(0, 64)
	unlike := func(p events.Packet) *events.Packet {
		p.Data = append([]byte(nil), p.Data...)
		p.Data[9] = 4
		return &p
	}
	first, later := tracked(5, 5, "NEW", false), tracked(5, 5, "NEW", true)
	mine, still := tracked(1, 7, "ESTABLISHED", true), tracked(5, 7, "ESTABLISHED", true)
	untracked, unread := *pkt(1, 64), *pkt(1, 64)
	untracked.CT, unread.CT = "UNTRACKED", "NEW"
	template := rule{target: "CT", rev: 2, data: make([]byte, 16)}
	untrack := rule{target: "CT", rev: 2, data: append([]byte{1}, make([]byte, 15)...)}
	nft := func(leaves bool) []events.Step {
		return []events.Step{{Table: &events.TableRun{NFT: &events.NFTRun{LeavesConn: leaves}}}}
	}
	for _, tt := range []struct {
		name     string
		hook     uint8
		table    string
		rules    []rule
		before   events.Packet
		after    *events.Packet
		tracked  bool
		afterNAT bool
		others   []events.Step
		want     []packetRule
	}{
		{"the first packet of all", events.HookPreRouting, "mangle", recipe, before, unlike(first), true, false, nil, []packetRule{at(0), at(0), at(5), at(5)}},
		{"the second, before a reply", events.HookPreRouting, "mangle", recipe, before, unlike(later), true, false, nil, []packetRule{at(0), lost}},
		{"nobody saved it", events.HookPreRouting, "mangle", []rule{restore, five}, before, unlike(still), true, false, nil, []packetRule{at(0), at(7), at(5)}},
		{"mark 0 behind, in all that is seen", events.HookPreRouting, "mangle", []rule{five, restore, five}, before, nil, true, false, nil, []packetRule{at(0), at(5), lost}},
		{"known before", events.HookLocalIn, "mangle", []rule{restore, five}, mine, nil, true, false, nil, []packetRule{at(1), at(7), at(5)}},
		{"untracked", events.HookLocalIn, "mangle", []rule{restore, five}, untracked, nil, false, false, nil, []packetRule{at(1), at(1), at(5)}},
		{"tracked, with a mark that was not read", events.HookLocalIn, "mangle", []rule{restore, five}, unread, nil, true, false, nil, []packetRule{at(1), lost}},
		{"and another behind", events.HookLocalIn, "mangle", []rule{restore, five}, mine, unlike(tracked(5, 8, "ESTABLISHED", true)), true, false, nil, []packetRule{at(1), lost}},
		{"not tracked, an invalid packet", events.HookPreRouting, "mangle", []rule{five, restore, save}, before, unlike(*pkt(5, 64)), false, false, nil, []packetRule{at(0), at(5), at(5), at(5)}},
		{"before it is tracked", events.HookPreRouting, "raw", []rule{five, restore, save}, before, unlike(tracked(5, 9, "ESTABLISHED", true)), true, false, nil, []packetRule{at(0), at(5), at(5), at(5)}},
		{"a template", events.HookPreRouting, "raw", []rule{template, restore, five}, before, unlike(still), true, false, nil, []packetRule{at(0), at(0), lost}},
		{"told to be untracked", events.HookPreRouting, "raw", []rule{untrack, restore, five}, before, unlike(still), true, false, nil, []packetRule{at(0), at(0), at(0), at(5)}},
		{"nf_tables leaves it", events.HookPreRouting, "mangle", []rule{restore, five}, before, unlike(still), true, false, nft(true), []packetRule{at(0), at(7), at(5)}},
		{"nf_tables may set it", events.HookPreRouting, "mangle", []rule{restore, five}, before, unlike(still), true, false, nft(false), []packetRule{at(0), lost}},
		{"behind NAT", events.HookLocalOut, "filter", []rule{restore, five}, mine, unlike(still), true, true, nil, []packetRule{not("seen only behind"), not("seen only behind")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			part := &events.Part{Before: tt.before, After: tt.after, Tracked: tt.tracked, AfterNAT: tt.afterNAT, Verdict: accept}
			run := runOf(t, tt.table, part, accept, tt.rules)
			run.step.Place = &events.Place{Hook: tt.hook, PF: events.PFIPv4}
			packetsOf([]tableRun{run}, tt.others)
			checkPackets(t, run.step.Table, tt.want)
		})
	}
}

func markIf(value uint32) rule {
	r := mark(value, 0xffffffff)
	r.cond = true
	return r
}

// rule is a rule of the IPv4 tables that these tests make up, in the chain INPUT
// or behind it in the only user chain, U.
type rule struct {
	cond   bool   // it has a condition, so a packet may pass it by
	target string // ACCEPT, DROP, QUEUE, RETURN, "jump U", "" or an extension's name
	rev    byte
	data   []byte
	match  string // the name of a match, if there is one
}

// inputTable lays out struct ipt_replace's entries: INPUT with its policy, U, the end.
func inputTable(t testing.TB, input, user []rule) *symbolize.Table {
	t.Helper()
	return namedTable(t, "filter", input, user)
}

func namedTable(t testing.TB, table string, input, user []rule) *symbolize.Table {
	t.Helper()
	const size, targetOffset, nextOffset = 112, 88, 90 // struct ipt_entry
	var blob []byte
	n := uint32(0)
	var jumps []int
	extension := func(name string, rev byte, data []byte) []byte {
		b := make([]byte, (32+len(data)+7)&^7)
		binary.NativeEndian.PutUint16(b, uint16(len(b)))
		copy(b[2:31], name)
		b[31] = rev
		copy(b[32:], data)
		return b
	}
	add := func(r rule) {
		e := make([]byte, size)
		if r.cond {
			e[0], e[8] = 10, 0xff // -s 10.0.0.0/8
		}
		if r.match != "" {
			e = append(e, extension(r.match, 0, make([]byte, 16))...)
		}
		target := len(e)
		verdict, standard := map[string]int32{"ACCEPT": -2, "DROP": -1, "QUEUE": -4, "RETURN": -5, "jump U": 0, "": 0}[r.target]
		if standard {
			switch r.target {
			case "jump U":
				jumps = append(jumps, len(blob)+target+32)
			case "":
				verdict = int32(len(blob) + target + 40)
			}
			e = append(e, extension("", 0, binary.NativeEndian.AppendUint32(nil, uint32(verdict)))...)
		} else {
			e = append(e, extension(r.target, r.rev, r.data)...)
		}
		binary.NativeEndian.PutUint16(e[targetOffset:], uint16(target))
		binary.NativeEndian.PutUint16(e[nextOffset:], uint16(len(e)))
		blob = append(blob, e...)
		n++
	}
	name := func(s string) []byte { return append([]byte(s), make([]byte, 30-len(s))...) }
	info := symbolize.Info{ValidHooks: 1 << events.HookLocalIn}
	for _, r := range input {
		add(r)
	}
	info.Underflow[events.HookLocalIn] = uint32(len(blob))
	add(rule{target: "ACCEPT"})
	if user != nil {
		add(rule{target: "ERROR", data: name("U")})
		for _, j := range jumps {
			binary.NativeEndian.PutUint32(blob[j:], uint32(len(blob)))
		}
		for _, r := range user {
			add(r)
		}
		add(rule{target: "RETURN"})
	}
	add(rule{target: "ERROR", data: name("ERROR")})
	info.NumEntries, info.Size = n, uint32(len(blob))
	parsed, err := symbolize.ParseTable(symbolize.IPv4, table, info, blob)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// hits makes one hit of n packets of 84 bytes of each index: "index, n, index, n …".
func hits(in ...int) []events.Hit {
	out := []events.Hit{}
	for i := 0; i < len(in); i += 2 {
		out = append(out, events.Hit{Index: in[i], Packets: uint64(in[i+1]), Bytes: uint64(84 * in[i+1])})
	}
	return out
}

// Paths are bounded for all rulesets together.
func TestPathsAreBounded(t *testing.T) {
	r := newResolver(nil, newRulesets(nil, nil, nil), newNFTRulesets(nil, nil, nil), nil, false)
	r.eb = newEBTRulesets(r.tables)
	legacy := &ruleset{id: events.TableID{Gen: 7}}
	nft := &nftRuleset{paths: map[string]*nftPath{"a": {}}}
	ebt := &ebtRuleset{id: events.TableID{Gen: 7}, paths: map[string]*ebtPath{"a": {}}}
	r.tables.keep(legacy)
	r.nft.keep(nftID{77, 2}, nft)
	r.eb.generations.keep(ebt.id, ebt)
	kept := func() int { return len(legacy.paths.all) + len(nft.paths) + len(ebt.paths) }
	key := make([]byte, 8)
	for n := range uint64(maxPaths) {
		binary.NativeEndian.PutUint64(key, n)
		r.roomForPath()
		legacy.paths.put(key, &knownPath{})
	}
	legacy.paths.get(1, key)
	if got := kept(); got != maxPaths+2 {
		t.Errorf("%d paths are kept, want %d", got, maxPaths+2)
	}
	r.roomForPath()
	if got := kept(); got != 0 || legacy.paths.get(1, key) != nil {
		t.Errorf("%d paths are kept, want none", got)
	}
}
