package events

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// script writes records of one journey as the probes do.
type script struct {
	t     testing.TB
	a     *Assembler
	jid   uint64
	netns uint32
	seq   uint32
	now   uint64
	done  []*Journey
	keep  func(raw []byte) // instead of giving it to a
	split bool             // the next part of a hook is one behind NAT
}

func newScript(t *testing.T, a *Assembler, jid uint64) *script {
	return &script{t: t, a: a, jid: jid, netns: 77, now: uint64(time.Second)}
}

func (s *script) hdr(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag) bpf.NftraceRecHdr {
	s.now += 1000
	h := bpf.NftraceRecHdr{Ts: s.now, Jid: s.jid, Seq: s.seq, Netns: s.netns, Type: uint16(typ), Flags: uint32(flags)}
	s.seq++
	return h
}

func bytesOf[T any](v *T, size uintptr) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), size)
}

// copyOf is a record in memory that goes on behind it, as the ring buffer's does.
func copyOf(raw []byte) []byte {
	return append(make([]byte, 0, len(raw)+int(unsafe.Sizeof(bpf.NftraceRecHook{}))), raw...)
}

func (s *script) add(raw []byte) {
	s.t.Helper()
	if s.keep != nil {
		s.keep(raw)
		return
	}
	js, err := s.a.Add(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	s.done = append(s.done, clone(js)...)
}

// clone copies journeys with all that is in them: what an Assembler returns is valid until
// its next call only.
func clone(js []*Journey) []*Journey {
	packet := func(p Packet) Packet {
		p.Data, p.MAC = slices.Clone(p.Data), slices.Clone(p.MAC)
		return p
	}
	pointed := func(p *Packet) *Packet {
		if p == nil {
			return nil
		}
		q := packet(*p)
		return &q
	}
	var out []*Journey
	for _, j := range js {
		kept := *j
		kept.First, kept.Steps = packet(j.First), slices.Clone(j.Steps)
		parts := map[*Part]*Part{}
		for i := range kept.Steps {
			s := &kept.Steps[i]
			place := *s.Place
			s.Place = &place
			if s.NAT != nil {
				n := *s.NAT
				s.NAT = &n
			}
			if s.Table == nil {
				continue
			}
			t := *s.Table
			t.Hits, t.Before = slices.Clone(t.Hits), pointed(t.Before)
			if parts[t.Part] == nil {
				p := *t.Part
				p.Before, p.After, p.End = packet(p.Before), pointed(p.After), pointed(p.End)
				parts[t.Part] = &p
			}
			t.Part = parts[t.Part]
			s.Table = &t
		}
		out = append(out, &kept)
	}
	return out
}

func dev(index uint32, name string) bpf.NftraceDev {
	d := bpf.NftraceDev{Ifindex: index}
	for i := range name {
		d.Name[i] = int8(name[i])
	}
	return d
}

// ping is an ICMP echo request of 84 bytes from 10.0.0.1 to 10.0.0.2.
func ping() bpf.NftracePkt {
	p := bpf.NftracePkt{Len: 84, Ethertype: 0x0800, Cap: 28}
	copy(p.Data[:], []byte{
		0x45, 0, 0, 84, 0, 1, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
		8, 0, 0, 0, 0, 5, 0, 1,
	})
	return p
}

// part is a REC_HOOK: tables make it a whole one.
type part struct {
	hook   uint8
	pf     uint8 // 0: IPv4
	flags  bpf.NftraceRecFlag
	before *bpf.NftracePkt // nil: none, or with tables a ping
	tables []string
	runs   int // -1: as many as tables with hits
	hits   []bpf.NftraceHit
	in     bpf.NftraceDev // none: eth0
	gen    uint64         // more than the tables' generations are otherwise
}

func hit(table, index, packets int) bpf.NftraceHit {
	return bpf.NftraceHit{Table: uint16(table), Index: uint32(index), Packets: uint16(packets), Bytes: uint64(84 * packets)}
}

func (s *script) part(p part) {
	s.t.Helper()
	if s.split {
		p.flags |= bpf.NftraceRecFlagREC_F_SPLIT
		s.split = false
	}
	r := bpf.NftraceRecHook{Hdr: s.hdr(bpf.NftraceRecTypeREC_HOOK, p.flags)}
	r.EntryTs = r.Hdr.Ts - 500
	r.Place.Hook, r.Place.Pf, r.Place.Physin = p.hook, PFIPv4, 3
	if p.pf != 0 {
		r.Place.Pf = p.pf
	}
	r.Place.In = dev(3, "eth0")
	if p.in.Ifindex != 0 {
		r.Place.In = p.in
	}
	size := unsafe.Offsetof(r.Before)
	if p.before != nil {
		r.Before = *p.before
		size = unsafe.Offsetof(r.Nhits)
	}
	if len(p.tables) > 0 {
		if p.before == nil {
			r.Before = ping()
		}
		r.Ntables, r.Nhits, r.Runs = uint32(len(p.tables)), uint32(len(p.hits)), uint32(p.runs)
		if p.runs < 0 {
			with := map[uint16]bool{}
			for _, h := range p.hits {
				with[h.Table] = true
			}
			r.Runs = uint32(len(with))
		}
		for i, name := range p.tables {
			t := &r.Tables[i]
			t.Private, t.Gen = 0xabc0+uint64(i), 1+uint64(i)+p.gen
			copy(bytesOf(&t.Name, unsafe.Sizeof(t.Name)), name)
		}
		copy(r.Hits[:], p.hits)
		size = unsafe.Offsetof(r.Hits) + uintptr(len(p.hits))*unsafe.Sizeof(r.Hits[0])
	}
	s.add(bytesOf(&r, size))
}

// first is the first part of a journey, at a hook without tables.
func (s *script) first(hook uint8, flags bpf.NftraceRecFlag) {
	p := ping()
	s.part(part{hook: hook, flags: flags, before: &p})
}

// filter is a hook at which table filter ran through entry 4.
func (s *script) filter(hook uint8) {
	s.part(part{hook: hook, tables: []string{"filter"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
}

func (s *script) nat(manip uint8) {
	s.split = true
	r := bpf.NftraceRecNat{Hdr: s.hdr(bpf.NftraceRecTypeREC_NAT, 0), Manip: manip, Dir: 1}
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

func (s *script) after(p bpf.NftracePkt) {
	r := bpf.NftraceRecPkt{Hdr: s.hdr(bpf.NftraceRecTypeREC_AFTER, 0), Pkt: p}
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

func (s *script) header(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag) {
	h := s.hdr(typ, flags)
	s.add(bytesOf(&h, unsafe.Sizeof(h)))
}

// drop is what the kernel tells of a packet that a hook dropped: that, and its end.
func (s *script) drop() {
	s.header(bpf.NftraceRecTypeREC_DROP, 0)
	s.end(0)
}

func (s *script) xmit() { s.device(bpf.NftraceRecTypeREC_XMIT, 0, dev(4, "eth1")) }

func (s *script) device(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag, d bpf.NftraceDev) {
	r := bpf.NftraceRecDev{Hdr: s.hdr(typ, flags), Dev: d}
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

func (s *script) end(flags bpf.NftraceRecFlag) { s.header(bpf.NftraceRecTypeREC_END, flags) }

// journeys ends the script well after its last record.
func (s *script) journeys() []*Journey {
	return append(s.done, clone(s.a.Idle(time.Duration(s.now)+2*settle))...)
}

// journey ends the script, which must have made one journey.
func (s *script) journey() *Journey {
	s.t.Helper()
	js := s.journeys()
	if len(js) != 1 {
		s.t.Fatalf("%d journeys, want 1", len(js))
	}
	return js[0]
}

// The kernel skips NAT's probe where it is hit within itself: that the packet was given another
// destination is seen behind the hook only.
func TestNATUnseen(t *testing.T) {
	tables := part{hook: HookLocalOut, tables: []string{"nat", "filter"}, runs: 2, hits: []bpf.NftraceHit{hit(0, 1, 1), hit(1, 2, 1)}}
	other := ping()
	other.Data[15] = 9 // the source
	longer := dnatted()
	longer.Len += 20
	for _, tt := range []struct {
		name           string
		hook           uint8
		flags          bpf.NftraceRecFlag
		run            func(s *script)
		natted, unseen bool
	}{
		{"seen behind", HookLocalOut, 0, func(s *script) { s.after(dnatted()) }, true, false},
		{"not seen behind", HookLocalOut, bpf.NftraceRecFlagREC_F_UNSEEN, func(s *script) {}, false, true},
		{"not changed", HookLocalOut, 0, func(s *script) {}, false, false},
		{"another change", HookLocalOut, 0, func(s *script) { s.after(other) }, false, false},
		{"in a tunnel", HookLocalOut, 0, func(s *script) { s.after(longer) }, false, false},
		{"no tables behind", HookPreRouting, 0, func(s *script) { s.after(dnatted()) }, false, false},
	} {
		s := newScript(t, NewAssembler(), 7)
		p := tables
		p.hook, p.flags = tt.hook, tt.flags
		s.part(p)
		tt.run(s)
		s.xmit()
		s.end(0)
		part := s.journey().Steps[1].Table.Part
		if part.NATUnseen != tt.natted || part.Unseen != tt.unseen {
			t.Errorf("%s: NATUnseen %v, Unseen %v", tt.name, part.NATUnseen, part.Unseen)
		}
		// It is told apart from others of its pattern.
		if known := part.Pattern != nil; known == (tt.natted || tt.unseen) {
			t.Errorf("%s: pattern %v", tt.name, part.Pattern)
		}
	}
	// A probe that told.
	s := newScript(t, NewAssembler(), 7)
	p := tables
	s.part(p)
	s.nat(1)
	d := dnatted()
	s.part(part{hook: HookLocalOut, before: &d})
	s.end(0)
	if part := s.journey().Steps[0].Table.Part; part.NATUnseen {
		t.Error("NAT was seen")
	}
}

func dnatted() bpf.NftracePkt {
	p := ping()
	p.Data[19] = 9
	return p
}

func fragment() *bpf.NftracePkt {
	p := ping()
	p.Data[6] = 0x20
	return &p
}

func TestOutcome(t *testing.T) {
	const none = bpf.NftraceRecFlag(0)
	for _, tt := range []struct {
		name string
		run  func(s *script)
		want Outcome
	}{
		{"forwarded", func(s *script) {
			s.first(HookPreRouting, none)
			s.filter(HookForward)
			s.xmit()
			s.end(none)
		}, Outcome{Kind: OutSent, Device: Device{4, "eth1"}, Step: 3, Rule: -1}},
		{"delivered", func(s *script) {
			s.first(HookPreRouting, none)
			s.filter(HookLocalIn)
			s.device(bpf.NftraceRecTypeREC_DELIVER, none, dev(3, "eth0"))
		}, Outcome{Kind: OutDelivered, Device: Device{3, "eth0"}, Step: -1, Rule: -1}},
		{"dropped at a hook; by whom its rules will tell", func(s *script) {
			s.first(HookPreRouting, none)
			s.filter(HookForward)
			s.drop()
			s.end(none)
		}, Outcome{Kind: OutDropped, Step: 2, Rule: -1}},
		{"dropped by a match of a table", func(s *script) {
			s.part(part{hook: HookForward, tables: []string{"filter"}, runs: 1})
			s.drop()
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"dropped by a hook without a table", func(s *script) {
			s.first(HookPreRouting, none)
			s.drop()
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"said twice", func(s *script) {
			s.first(HookPreRouting, none)
			s.drop()
			s.drop()
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"a fragment waits for the others", func(s *script) {
			s.part(part{hook: HookPreRouting, before: fragment()})
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 0, Rule: -1}},
		{"a fragment is gone, but not where they wait", func(s *script) {
			s.part(part{hook: HookForward, before: fragment()})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"a fragment of which the whole became, and that was freed", func(s *script) {
			s.part(part{hook: HookPreRouting, before: fragment(), tables: []string{"filter"}, runs: -1})
			s.after(ping())
			s.part(part{hook: HookPreRouting})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"a fragment that table raw let pass waits", func(s *script) {
			s.part(part{hook: HookPreRouting, before: fragment(), tables: []string{"raw"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 0, 1)}})
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 1, Rule: -1}},
		{"a fragment is gone behind a table that comes after where they wait", func(s *script) {
			s.part(part{hook: HookPreRouting, before: fragment(), tables: []string{"mangle"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 0, 1)}})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"perhaps only others ran through that table", func(s *script) {
			s.part(part{hook: HookPreRouting, flags: bpf.NftraceRecFlagREC_F_TORN, before: fragment(), tables: []string{"mangle"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 0, 1)}})
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 1, Rule: -1}},
		{"the bridge does not wait for fragments", func(s *script) {
			s.part(part{hook: HookPreRouting, pf: PFBridge, before: fragment()})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"dropped below br_netfilter", func(s *script) {
			s.part(part{hook: HookForward, pf: PFBridge})
			s.part(part{hook: HookForward})
			s.drop()
		}, Outcome{Kind: OutDropped, Step: 1, Rule: -1}},
		{"sent to a namespace that kept it", func(s *script) {
			s.part(part{hook: HookPreRouting, before: fragment()})
			s.xmit()
			s.netns = 78
			s.part(part{hook: HookPreRouting})
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 2, Rule: -1}},
		{"sent to a namespace that freed it", func(s *script) {
			s.first(HookPreRouting, none)
			s.xmit()
			s.netns = 78
			s.part(part{hook: HookPreRouting})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"dropped by the program that read its queue", func(s *script) {
			s.nft(nftRule(5, 7<<16|NFQueue))
			s.first(HookForward, none)
			s.header(bpf.NftraceRecTypeREC_DROP, bpf.NftraceRecFlagREC_F_REINJECTED)
			s.end(none)
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"dropped from a queue; by what rule it came there, its rules may tell", func(s *script) {
			s.filter(HookForward)
			s.header(bpf.NftraceRecTypeREC_DROP, bpf.NftraceRecFlagREC_F_REINJECTED)
			s.end(none)
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"dropped from the queue of a module that nobody knows", func(s *script) {
			s.first(HookForward, none)
			s.header(bpf.NftraceRecTypeREC_DROP, bpf.NftraceRecFlagREC_F_REINJECTED)
			s.end(none)
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"came back from its queue, and was dropped then", func(s *script) {
			s.filter(HookForward)
			s.part(part{hook: HookForward, flags: bpf.NftraceRecFlagREC_F_REINJECTED, tables: []string{"security"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
			s.drop()
		}, Outcome{Kind: OutDropped, Step: 3, Rule: -1}},
		{"ARP that comes in", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.part(part{pf: PFARP})
			s.end(none)
		}, Outcome{Kind: OutDelivered, Device: Device{3, "eth0"}, Step: -1, Rule: -1}},
		{"ARP that goes out", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.part(part{pf: PFARP, hook: 1})
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{"freed, nobody knows why", func(s *script) {
			s.first(HookPreRouting, none)
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.run(s)
			j := s.journey()
			if j.Outcome != tt.want {
				t.Errorf("outcome %+v, want %+v", j.Outcome, tt.want)
			}
			if j.Lost != 0 {
				t.Errorf("lost %d", j.Lost)
			}
		})
	}
}

// Where fragments wait for each other has a priority, which chains of nf_tables have, too.
func TestBehindDefrag(t *testing.T) {
	for _, tt := range []struct {
		typ      string
		priority int
		want     bool
	}{{"filter", -300, true}, {"filter", -400, false}, {"filter", -450, false}, {"", 0, false}} {
		j := Journey{Steps: []Step{
			{Kind: StepTable, Table: &TableRun{Name: "filter", NFT: &NFTRun{Type: tt.typ, Priority: tt.priority}}}, {Kind: StepHook},
		}}
		if got := j.behindDefrag(1); got != tt.want {
			t.Errorf("chain of type %q at %d: %v, want %v", tt.typ, tt.priority, got, tt.want)
		}
	}
}

// What rules make of the last table's verdict decides the outcome.
func TestConclude(t *testing.T) {
	for _, tt := range []struct {
		table, hook int
		want        Outcome
	}{
		{NFDrop, NFDrop, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{NFAccept, NFDrop, Outcome{Kind: OutDropped, Step: 1, Rule: -1}},
		{VerdictUnknown, NFDrop, Outcome{Kind: OutDropped, Step: 1, Rule: -1}},
		{NFQueue, VerdictUnknown, Outcome{Kind: OutQueued, Step: 0, Rule: -1}},
		{NFStolen, VerdictUnknown, Outcome{Kind: OutStolen, Step: 0, Rule: -1}},
		{NFDrop, VerdictUnknown, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{NFAccept, VerdictUnknown, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
		{NFQueue, NFAccept, Outcome{Kind: OutFreed, Step: -1, Rule: -1}}, // it came back
	} {
		j := Journey{ended: true, Steps: []Step{
			{Place: &Place{PF: PFIPv4}, Kind: StepTable, Verdict: tt.table, Table: &TableRun{}},
			{Place: &Place{PF: PFIPv4}, Kind: StepHook, Verdict: tt.hook},
		}}
		j.Conclude()
		if j.Outcome != tt.want {
			t.Errorf("table %d, hook %d: %+v, want %+v", tt.table, tt.hook, j.Outcome, tt.want)
		}
	}
}

// A part behind NAT is known as such though the record of NAT was lost: of its packet is known how it
// was at the part's end.
func TestLostNAT(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.filter(HookLocalOut)
	s.seq++
	s.split = true
	s.filter(HookLocalOut)
	// Another packet's, at the same address, within the call of one whose end was not seen.
	s.split = true
	s.part(part{hook: HookLocalOut, tables: []string{"filter", "nat"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 4, 1), hit(1, 1, 1)}})
	s.xmit()
	s.end(0)
	j := s.journey()
	var got []bool
	for i := range j.Steps {
		if run := j.Steps[i].Table; run != nil {
			got = append(got, run.Part.AfterNAT)
		}
	}
	if want := []bool{false, true, false, false}; !slices.Equal(got, want) || j.Lost != 1 {
		t.Errorf("behind NAT: %v, want %v; lost %d", got, want, j.Lost)
	}
}

// What is left of a hook behind a queue is a visit of its own.
func TestReinjected(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.first(HookForward, 0)
	s.part(part{hook: HookForward, flags: bpf.NftraceRecFlagREC_F_REINJECTED, tables: []string{"filter"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
	s.xmit()
	s.end(0)
	j := s.journey()
	var got []bool
	for i := range j.Steps {
		got = append(got, j.Steps[i].Reinjected)
	}
	if want := []bool{false, true, true, false}; !slices.Equal(got, want) {
		t.Errorf("reinjected: %v, want %v", got, want)
	}
	if j.Lost != 0 || j.Steps[0].Verdict != NFAccept || j.Steps[1].Table.Unresolved != "" {
		t.Errorf("lost %d, steps %+v", j.Lost, j.Steps)
	}
}

// A match that drops the packet behind a queue that nobody reads is in a table behind the one that queued it.
func TestDroppedBehindQueue(t *testing.T) {
	tables := []string{"security", "filter", "mangle"}
	s := newScript(t, NewAssembler(), 7)
	s.part(part{hook: HookForward, tables: tables, runs: -1, hits: []bpf.NftraceHit{hit(2, 4, 1)}})
	s.part(part{hook: HookForward, tables: tables, runs: 1})
	s.drop()
	j := s.journey()
	var got []string
	for i := range j.Steps {
		if run := j.Steps[i].Table; run != nil {
			got = append(got, run.Name)
		}
	}
	if want := []string{"mangle", "filter"}; !slices.Equal(got, want) || j.Outcome.Step != 2 {
		t.Errorf("tables %v, want %v; outcome %+v", got, want, j.Outcome)
	}
}

func TestUnfinishedJourneysComeWithFlush(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.first(HookPreRouting, 0)
	if js := s.journeys(); len(js) != 0 {
		t.Fatalf("%d journeys before the end", len(js))
	}
	js := a.Flush(1)
	if len(js) != 1 || js[0].Outcome.Kind != OutUnknown {
		t.Fatalf("Flush gave %+v", js)
	}
	if st := js[0].Steps; len(st) != 1 || st[0].Kind != StepHook || st[0].Verdict != VerdictUnknown {
		t.Errorf("steps %+v, want the hook that it is in", st)
	}
	if again := a.Flush(1); len(again) != 0 {
		t.Fatalf("Flush gave %d journeys twice", len(again))
	}
}

func TestHolesAreCounted(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.first(HookPreRouting, 0)
	s.seq += 3 // records that found the buffer full
	s.end(0)
	if j := s.journey(); j.Lost != 3 || a.Stats().Lost != 3 {
		t.Fatalf("%+v, stats %+v: want 3 lost", j, a.Stats())
	}
}

// What was lost may have been the hook that the next record speaks of.
func TestHoles(t *testing.T) {
	for _, tt := range []struct {
		name    string
		next    func(s *script)
		verdict int // of the first hook
		outcome OutcomeKind
	}{
		{"dropped by whom", func(s *script) { s.drop() }, VerdictUnknown, OutDropped},
		{"it went on", func(s *script) { s.xmit() }, NFAccept, OutUnknown},
		{"it was at another hook", func(s *script) { s.filter(HookForward) }, NFAccept, OutUnknown},
	} {
		s := newScript(t, NewAssembler(), 7)
		s.filter(HookPreRouting)
		s.seq++
		tt.next(s)
		js := append(s.journeys(), s.a.Flush(1)...)
		if len(js) != 1 {
			t.Fatalf("%s: %d journeys", tt.name, len(js))
		}
		j := js[0]
		if h := j.Steps[1]; h.Kind != StepHook || h.Verdict != tt.verdict {
			t.Errorf("%s: %+v", tt.name, h)
		}
		if p := j.Steps[0].Table.Part; p.After != nil {
			t.Errorf("%s: a packet is known behind the hook, though a record is missing", tt.name)
		}
		if j.Outcome.Kind != tt.outcome || j.Outcome.Step != -1 {
			t.Errorf("%s: %+v", tt.name, j.Outcome)
		}
	}
}

// If nothing is followed any more, the records of ends were lost.
func TestFlushOfLostEnds(t *testing.T) {
	for live, lost := range map[uint64]uint64{0: 1, 1: 0} {
		a := NewAssembler()
		s := newScript(t, a, 7)
		s.first(HookPreRouting, 0)
		if js := a.Flush(live); len(js) != 1 || js[0].Lost != lost || a.Stats().Lost != lost {
			t.Errorf("%d followed: Flush gave %+v, of which %d are lost; want one with %d", live, js, a.Stats().Lost, lost)
		}
	}
}

// Journeys whose ends were lost are not kept for ever: those that were heard of last are.
func TestLostEnds(t *testing.T) {
	a := NewAssembler()
	done := map[uint64]uint64{}
	last := newScript(t, a, 1)
	last.first(HookPreRouting, 0)
	const n = 3*underWay + 7
	for jid := uint64(2); jid <= n; jid++ {
		s := newScript(t, a, jid)
		s.now = last.now
		s.first(HookPreRouting, 0)
		if jid%1009 == 0 {
			// The first one goes on.
			last.now = s.now
			last.part(part{hook: HookForward})
		} else {
			last.now = s.now
		}
		for _, j := range s.done {
			done[j.ID] = j.Lost
		}
	}
	if a.opened > 2*underWay || len(done)+a.opened != n {
		t.Errorf("%d are open, %d done, of %d", a.opened, len(done), n)
	}
	for jid, lost := range done {
		if jid == 1 || jid > n-underWay || lost != 1 {
			t.Fatalf("journey %d was given up, with %d lost", jid, lost)
		}
	}
	if got := a.Stats(); got.Lost != uint64(len(done)) || got.Packets != got.Lost {
		t.Errorf("%+v, want %d lost", got, len(done))
	}
	last.end(0)
	last.now += uint64(time.Second)
	if js := a.Idle(time.Duration(last.now)); len(js) != 1 || js[0].ID != 1 || js[0].Lost != 0 || js[0].HalfSeen != "" {
		t.Errorf("the one that went on: %+v", js)
	}
}

// A packet that is followed tentatively is handed out only if the filter matched.
// A packet that goes round forever is told in pieces.
func TestLoop(t *testing.T) {
	for _, tt := range []struct {
		name string
		flag bpf.NftraceRecFlag
		want int // steps
	}{
		{"followed", 0, 10007 + 1},
		{"not wanted", bpf.NftraceRecFlagREC_F_TENTATIVE, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			s.first(HookPreRouting, tt.flag)
			steps, pieces := 0, 0
			count := func(js []*Journey) {
				for _, j := range js {
					if len(j.Steps) > maxSteps+2 || j.Lost != 0 || j.First.Len == 0 || (j.HalfSeen == "") != (pieces == 0) {
						t.Fatalf("piece %d: %d steps, %d lost, half seen %q, first %+v", pieces, len(j.Steps), j.Lost, j.HalfSeen, j.First)
					}
					steps += len(j.Steps)
					pieces++
				}
			}
			for range 10007 {
				s.device(bpf.NftraceRecTypeREC_XMIT, tt.flag, dev(4, "eth1"))
				count(s.done)
				s.done = nil
			}
			s.end(tt.flag)
			count(s.journeys())
			if steps != tt.want || tt.want > 0 && pieces != 1+tt.want/maxSteps {
				t.Errorf("%d steps in %d pieces, want %d", steps, pieces, tt.want)
			}
			if s.a.opened != 0 {
				t.Errorf("%d are open", s.a.opened)
			}
		})
	}
}

// Names of devices of which nothing is heard any more are forgotten in the long run.
func TestNamesAreBounded(t *testing.T) {
	a := NewAssembler()
	for i := range uint32(3 * maxNames) {
		d := dev(i+1, "eth0")
		if got := a.device(i%97, &d); got != (Device{Index: int(i + 1), Name: "eth0"}) {
			t.Fatalf("device %d is %+v", i+1, got)
		}
		d = dev(1<<20, "br0")
		if got := a.device(7, &d); got.Name != "br0" {
			t.Fatalf("device br0 is %+v", got)
		}
		if len(a.names) > maxNames {
			t.Fatalf("%d names are kept", len(a.names))
		}
	}
}

func TestTentative(t *testing.T) {
	const tentative = bpf.NftraceRecFlagREC_F_TENTATIVE
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.first(HookPreRouting, tentative)
	s.part(part{hook: HookForward, flags: tentative})
	s.end(tentative)
	if js := s.journeys(); len(js) != 0 {
		t.Fatalf("a packet that never matched was handed out: %+v", js[0])
	}
	s = newScript(t, a, 8)
	s.first(HookPreRouting, tentative)
	s.part(part{hook: HookForward})
	s.end(0)
	if j := s.journey(); len(j.Steps) != 2 {
		t.Fatalf("want the whole path, got %+v", j)
	}
	if got := len(a.Flush(1)); got != 0 {
		t.Fatalf("%d journeys left", got)
	}
}

func TestHalfSeen(t *testing.T) {
	for _, tt := range []struct {
		name string
		run  func(s *script)
		want string // a part of it
	}{
		{"whole", func(s *script) { s.first(HookForward, 0) }, ""},
		{"late", func(s *script) { s.first(HookForward, bpf.NftraceRecFlagREC_F_LATE) }, "from FORWARD on"},
		{"its beginning is lost", func(s *script) { s.seq = 1; s.filter(HookForward) }, "was lost"},
		{"its hook is lost", func(s *script) { s.seq = 1; s.xmit() }, "was lost"},
	} {
		s := newScript(t, NewAssembler(), 7)
		tt.run(s)
		s.end(0)
		j := s.journey()
		if tt.want == "" && j.HalfSeen != "" || !strings.Contains(j.HalfSeen, tt.want) {
			t.Errorf("%s: half seen %q, want %q", tt.name, j.HalfSeen, tt.want)
		}
		if p := &j.First; p.Data == nil && p.VLAN != -1 {
			t.Errorf("%s: VLAN %d of a packet that is not known", tt.name, p.VLAN)
		}
	}
}

// What a packet was first, and when.
func TestFirst(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.first(HookPreRouting, 0)
	p := dnatted()
	s.part(part{hook: HookForward, before: &p})
	s.end(0)
	j := s.journey()
	if len(j.First.Data) != 28 || j.First.Data[19] != 2 {
		t.Errorf("first %+v", j.First)
	}
	if want := time.Second + 500; j.Start != want {
		t.Errorf("start %v, want %v", j.Start, want)
	}
}

// shape is a journey's steps in words: tables with what became of them, verdicts of hooks.
func shape(j *Journey) string {
	verdict := func(v int) string {
		return map[int]string{NFDrop: "drop", NFAccept: "accept", VerdictUnknown: "?"}[v]
	}
	var words []string
	for i := range j.Steps {
		switch s := &j.Steps[i]; s.Kind {
		case StepTable:
			w := s.Table.Name + "=" + verdict(s.Verdict)
			for _, h := range s.Table.Hits {
				w += fmt.Sprintf(" %dx%d", h.Index, h.Packets)
			}
			if s.Table.Unresolved != "" {
				w += " unresolved"
			}
			words = append(words, w)
		case StepHook:
			words = append(words, HookName(s.PF, s.Hook)+"="+verdict(s.Verdict))
		case StepNAT:
			words = append(words, "nat "+s.NAT.Before.Dst.Addr().String()+">"+s.NAT.After.Dst.Addr().String())
		default:
			words = append(words, fmt.Sprintf("step %d", s.Kind))
		}
	}
	return strings.Join(words, ", ")
}

// The tables of a hook, in the kernel's order, and their verdicts.
func TestTables(t *testing.T) {
	all := []string{"security", "filter", "nat", "mangle", "raw"}
	const security, filter, nat, mangle, raw = 0, 1, 2, 3, 4
	hits := func(h ...bpf.NftraceHit) []bpf.NftraceHit { return h }
	each := hits(hit(security, 1, 1), hit(filter, 1, 1), hit(nat, 1, 1), hit(mangle, 1, 1), hit(raw, 1, 1))
	for _, tt := range []struct {
		name string
		p    part
		next string // what comes then: xmit, drop or end
		want string
	}{
		{"order at OUTPUT", part{hook: HookLocalOut, runs: -1, hits: each}, "xmit",
			"raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, filter=accept 1x1, security=accept 1x1, OUTPUT=accept"},
		{"order at INPUT", part{hook: HookLocalIn, runs: -1, hits: each}, "xmit",
			"raw=accept 1x1, mangle=accept 1x1, filter=accept 1x1, security=accept 1x1, nat=accept 1x1, INPUT=accept"},
		{"hits are sorted and added up", part{runs: -1, hits: hits(hit(filter, 9, 2), hit(mangle, 3, 1), hit(filter, 4, 1), hit(filter, 9, 1))}, "xmit",
			"mangle=accept 3x1, filter=accept 4x1 9x3, PREROUTING=accept"},
		{"nothing ran", part{}, "xmit", "PREROUTING=accept"},
		{"dropped: the last one may have", part{runs: -1, hits: hits(hit(mangle, 1, 1), hit(filter, 1, 1))}, "drop",
			"mangle=accept 1x1, filter=? 1x1, PREROUTING=drop"},
		{"gone: the last one may have kept it", part{runs: -1, hits: hits(hit(mangle, 1, 1), hit(filter, 1, 1))}, "end",
			"mangle=accept 1x1, filter=? 1x1, PREROUTING=?"},
		{"a match dropped it", part{runs: 2, hits: hits(hit(raw, 1, 1))}, "drop",
			"raw=accept 1x1, mangle=drop, PREROUTING=drop"},
		{"a match dropped it in the first table", part{runs: 1}, "drop", "raw=drop, PREROUTING=drop"},
		{"perhaps in table nat", part{hook: HookLocalOut, runs: 3, hits: hits(hit(raw, 1, 1), hit(mangle, 1, 1))}, "drop",
			"raw=accept 1x1, mangle=accept 1x1, filter=? unresolved, OUTPUT=drop"},
		{"behind table nat", part{hook: HookLocalOut, runs: 4, hits: hits(hit(raw, 1, 1), hit(mangle, 1, 1), hit(nat, 1, 1))}, "drop",
			"raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, filter=drop, OUTPUT=drop"},
		{"before table nat", part{hook: HookLocalIn, runs: 2, hits: hits(hit(mangle, 1, 1))}, "drop",
			"mangle=accept 1x1, filter=drop, INPUT=drop"},
		{"behind the last table", part{runs: 2, hits: hits(hit(security, 1, 1))}, "drop", "security=? 1x1 unresolved, PREROUTING=drop"},
		{"one run too many", part{runs: 2, hits: hits(hit(raw, 1, 1))}, "xmit", "raw=accept 1x1 unresolved, PREROUTING=accept"},
		{"two too many", part{runs: 3, hits: hits(hit(raw, 1, 1))}, "drop", "raw=? 1x1 unresolved, PREROUTING=drop"},
		{"one too few", part{runs: 1, hits: hits(hit(raw, 1, 1), hit(filter, 1, 1))}, "xmit",
			"raw=accept 1x1 unresolved, filter=accept 1x1 unresolved, PREROUTING=accept"},
		{"runs that left nothing", part{runs: 2}, "xmit", "raw=accept unresolved, PREROUTING=accept"},
		{"gone, and too many", part{runs: 2, hits: hits(hit(raw, 1, 1))}, "end", "raw=? 1x1 unresolved, PREROUTING=?"},
		{"runs say nothing", part{flags: bpf.NftraceRecFlagREC_F_UNCOUNTED, runs: 7, hits: hits(hit(raw, 1, 1))}, "xmit",
			"raw=accept 1x1, PREROUTING=accept"},
		{"torn", part{flags: bpf.NftraceRecFlagREC_F_TORN, runs: 1, hits: hits(hit(raw, 1, 1))}, "xmit",
			"raw=accept 1x1 unresolved, mangle=accept unresolved, filter=accept unresolved, security=accept unresolved, PREROUTING=accept"},
		{"torn, and nat was there", part{flags: bpf.NftraceRecFlagREC_F_TORN, runs: 9, hits: hits(hit(nat, 1, 1))}, "drop",
			"raw=? unresolved, mangle=? unresolved, nat=? 1x1 unresolved, filter=? unresolved, security=? unresolved, PREROUTING=drop"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.p.tables = all
			s.part(tt.p)
			switch tt.next {
			case "xmit":
				s.xmit()
				s.end(0)
			case "drop":
				s.drop()
			default:
				s.end(0)
			}
			if got := strings.TrimSuffix(shape(s.journey()), fmt.Sprintf(", step %d", StepXmit)); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestWhyUnresolved(t *testing.T) {
	for flag, want := range map[bpf.NftraceRecFlag]string{
		bpf.NftraceRecFlagREC_F_TORN:     "another packet",
		bpf.NftraceRecFlagREC_F_REPLACED: "was replaced",
		bpf.NftraceRecFlagREC_F_NOTABLE:  "more rules than",
		bpf.NftraceRecFlagREC_F_TOOMANY:  "more rules matched",
		bpf.NftraceRecFlagREC_F_FAULT:    "could not be read",
	} {
		s := newScript(t, NewAssembler(), 7)
		s.part(part{hook: HookForward, flags: flag, tables: []string{"filter"}})
		s.end(0)
		if got := s.journey().Steps[0].Table.Unresolved; !strings.Contains(got, want) {
			t.Errorf("flag %#x: %q, want %q", flag, got, want)
		}
	}
	s := newScript(t, NewAssembler(), 7)
	s.part(part{hook: HookForward, tables: []string{"filter"}, runs: 2, hits: []bpf.NftraceHit{hit(0, 1, 1)}})
	s.end(0)
	if got := s.journey().Steps[0].Table.Unresolved; got != "other packets ran through the tables unseen" {
		t.Errorf("%q", got)
	}
}

func TestTableStep(t *testing.T) {
	a := NewAssembler()
	type seen struct {
		name  string
		id    TableID
		netns uint32
		pf    uint8
		seq   uint32
	}
	var got []seen
	s := newScript(t, a, 7)
	a.OnRun = func(st *Step) { got = append(got, seen{st.Table.Name, st.Table.ID, st.Netns, st.PF, s.seq}) }
	s.part(part{hook: HookForward, tables: []string{"filter", "mangle"}, runs: 2, hits: []bpf.NftraceHit{hit(1, 4, 1)}})
	s.drop()
	j := s.journey()
	if len(j.Steps) != 3 {
		t.Fatalf("got %s", shape(j))
	}
	st := j.Steps[0]
	if st.Table.Name != "mangle" || st.Table.ID != (TableID{0xabc1, 2}) || st.Netns != 77 || st.Hook != HookForward {
		t.Errorf("table %+v of %+v", st.Table, st)
	}
	if want := (Hit{4, 1, 84}); len(st.Table.Hits) != 1 || st.Table.Hits[0] != want {
		t.Errorf("hits %+v", st.Table.Hits)
	}
	if st.PhysIn.Name != "eth0" {
		t.Errorf("bridge port %+v: the name was seen before", st.PhysIn)
	}
	if st.Table.Part != j.Steps[1].Table.Part || st.Table.Part.Verdict != NFDrop || len(st.Table.Before.Data) != 28 {
		t.Errorf("part %+v", st.Table.Part)
	}
	// At once, but for what only the drop told.
	if want := []seen{{"mangle", TableID{0xabc1, 2}, 77, PFIPv4, 1}, {"filter", TableID{0xabc0, 1}, 77, PFIPv4, 2}}; !slices.Equal(got, want) {
		t.Errorf("OnRun saw %+v, want %+v", got, want)
	}
}

// A rewrite divides a call in parts; the packet of the next part tells what it made.
func TestNAT(t *testing.T) {
	const want = "nat=accept 2x1, nat 10.0.0.2>10.0.0.9, filter=accept 4x1, OUTPUT=accept"
	natTable := part{hook: HookLocalOut, tables: []string{"nat", "filter"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 2, 1)}}
	behind := natTable
	rewritten := dnatted()
	behind.before, behind.hits = &rewritten, []bpf.NftraceHit{hit(1, 4, 1)}
	same := natTable
	same.hits = nil
	gone := behind
	gone.before = &bpf.NftracePkt{}
	bare := part{hook: HookLocalOut, before: &rewritten}
	other := dnatted()
	other.Data[9] = 50 // ESP
	all := []string{"filter", "nat", "mangle", "raw"}
	whole := part{hook: HookLocalOut, tables: all, runs: -1, hits: []bpf.NftraceHit{hit(1, 1, 1), hit(2, 1, 1), hit(3, 1, 1)}}
	for _, tt := range []struct {
		name string
		run  func(s *script)
		want string
	}{
		{"rewritten", func(s *script) { s.part(natTable); s.nat(1); s.part(behind); s.xmit() }, want},
		{"with what was behind the first part", func(s *script) {
			s.part(natTable)
			s.after(ping())
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, want},
		{"called twice, the first time for nothing", func(s *script) {
			s.part(natTable)
			s.nat(0)
			s.part(same)
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, want},
		{"dropped behind it", func(s *script) { s.part(natTable); s.nat(1); s.part(behind); s.drop() },
			"nat=accept 2x1, nat 10.0.0.2>10.0.0.9, filter=? 4x1, OUTPUT=drop"},
		{"not seen behind it", func(s *script) { s.part(natTable); s.nat(1); s.part(gone); s.drop() },
			"nat=accept 2x1, filter=? 4x1, OUTPUT=drop"},
		{"too many runs before it", func(s *script) {
			many := natTable
			many.runs = 2
			s.part(many)
			s.nat(1)
			s.part(behind)
			s.drop()
		}, "nat=accept 2x1 unresolved, nat 10.0.0.2>10.0.0.9, filter=? 4x1, OUTPUT=drop"},
		{"a match dropped it behind it", func(s *script) {
			s.part(whole)
			s.nat(1)
			s.part(part{hook: HookLocalOut, before: &rewritten, tables: all, runs: 1})
			s.drop()
		}, "raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, nat 10.0.0.2>10.0.0.9, filter=drop, OUTPUT=drop"},
		{"runs behind it that left nothing", func(s *script) {
			s.part(whole)
			s.nat(1)
			s.part(part{hook: HookLocalOut, before: &rewritten, tables: all, runs: 2})
			s.xmit()
		}, "raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, nat 10.0.0.2>10.0.0.9, filter=accept unresolved, OUTPUT=accept"},
		{"torn before it", func(s *script) {
			torn := whole
			torn.flags = bpf.NftraceRecFlagREC_F_TORN
			s.part(torn)
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, "raw=accept 1x1 unresolved, mangle=accept 1x1 unresolved, nat=accept 1x1 unresolved, nat 10.0.0.2>10.0.0.9, filter=accept 4x1, OUTPUT=accept"},
		{"torn behind it", func(s *script) {
			s.part(whole)
			s.nat(1)
			s.part(part{hook: HookLocalOut, flags: bpf.NftraceRecFlagREC_F_TORN, before: &rewritten, tables: all})
			s.xmit()
		}, "raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, nat 10.0.0.2>10.0.0.9, filter=accept unresolved, OUTPUT=accept"},
		{"torn between two rewrites", func(s *script) {
			s.part(whole)
			s.nat(0)
			s.part(part{hook: HookLocalOut, flags: bpf.NftraceRecFlagREC_F_TORN, tables: all, hits: whole.hits})
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, "raw=accept 1x1, mangle=accept 1x1, nat=accept 1x1, nat 10.0.0.2>10.0.0.9, filter=accept 4x1, OUTPUT=accept"},
		{"torn, and the hook is lost that NAT was in", func(s *script) {
			s.part(part{hook: HookLocalOut, flags: bpf.NftraceRecFlagREC_F_TORN, tables: all})
			s.seq++
			s.after(ping())
			s.nat(0)
			s.part(part{hook: HookPostRouting, before: &rewritten})
			s.xmit()
		}, "raw=accept unresolved, mangle=accept unresolved, filter=accept unresolved, OUTPUT=accept, POSTROUTING=accept"},
		{"torn at a hook where nat is the last", func(s *script) {
			torn := part{hook: HookLocalIn, flags: bpf.NftraceRecFlagREC_F_TORN, tables: all}
			s.part(torn)
			s.nat(1)
			s.part(torn)
			s.drop()
		}, "raw=accept unresolved, mangle=accept unresolved, filter=accept unresolved, INPUT=drop"},
		{"runs behind it where no table can run", func(s *script) {
			s.part(part{hook: HookLocalIn, tables: all, runs: -1, hits: []bpf.NftraceHit{hit(0, 1, 1), hit(2, 1, 1)}})
			s.nat(1)
			s.part(part{hook: HookLocalIn, before: &rewritten, tables: all, runs: 1})
			s.drop()
		}, "mangle=accept 1x1, filter=accept 1x1, nat 10.0.0.2>10.0.0.9, INPUT=drop"},
		{"runs before it where only nat can run", func(s *script) {
			s.part(part{hook: HookLocalOut, tables: natTable.tables, runs: 1})
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, "nat 10.0.0.2>10.0.0.9, filter=accept 4x1, OUTPUT=accept"},
		{"without tables", func(s *script) { s.first(HookLocalOut, 0); s.nat(1); s.part(bare); s.xmit() },
			"nat 10.0.0.2>10.0.0.9, OUTPUT=accept"},
		{"without tables, at a later hook", func(s *script) {
			s.first(HookForward, 0)
			s.part(part{hook: HookLocalOut})
			s.nat(1)
			s.part(bare)
			s.xmit()
		}, "FORWARD=accept, nat 10.0.0.2>10.0.0.9, OUTPUT=accept"},
		{"without tables, but it cannot have been the same", func(s *script) {
			s.first(HookForward, 0)
			s.part(part{hook: HookLocalOut})
			s.nat(1)
			s.part(part{hook: HookLocalOut, before: &other})
			s.xmit()
		}, "FORWARD=accept, OUTPUT=accept"},
		{"the source cannot have made it of that", func(s *script) {
			s.first(HookForward, 0)
			s.part(part{hook: HookLocalOut})
			s.nat(0)
			s.part(bare)
			s.xmit()
		}, "FORWARD=accept, OUTPUT=accept"},
		{"the next part is lost", func(s *script) { s.part(natTable); s.nat(1); s.seq++; s.xmit() },
			"nat=accept 2x1, OUTPUT=accept"},
		{"its record is lost", func(s *script) { s.part(natTable); s.seq++; s.part(behind); s.xmit() },
			"nat=accept 2x1, OUTPUT=accept, filter=accept 4x1, OUTPUT=accept"},
		{"its part is lost, and another hook is not", func(s *script) {
			s.part(natTable)
			s.nat(1)
			s.seq++
			s.part(behind)
			s.xmit()
		}, "nat=accept 2x1, OUTPUT=accept, filter=accept 4x1, OUTPUT=accept"},
		{"what it was before is lost", func(s *script) {
			s.first(HookForward, 0)
			s.seq++
			s.part(part{hook: HookLocalOut})
			s.nat(1)
			s.part(bare)
			s.xmit()
		}, "FORWARD=accept, OUTPUT=accept"},
		{"its hook is lost", func(s *script) {
			s.first(HookForward, 0)
			s.seq++
			s.nat(1)
			s.part(behind)
			s.xmit()
		}, "FORWARD=accept, filter=accept 4x1, OUTPUT=accept"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.run(s)
			s.end(0)
			j := s.journey()
			if got := strings.TrimSuffix(shape(j), fmt.Sprintf(", step %d", StepXmit)); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	s := newScript(t, NewAssembler(), 7)
	s.part(natTable)
	s.nat(1)
	s.part(behind)
	s.end(0)
	j := s.journey()
	if n := j.Steps[1].NAT; n.Source || !n.CTReply {
		t.Errorf("NAT %+v, want the destination in the reply direction", n)
	}
	if p := j.Steps[0].Table.Part; p.AfterNAT || p.Verdict != NFAccept || p.Before.Data[19] != 2 {
		t.Errorf("first part %+v", p)
	}
	if p := j.Steps[2].Table.Part; !p.AfterNAT || p.Verdict != VerdictUnknown || p.Before.Data[19] != 9 {
		t.Errorf("second part %+v", p)
	}
}

// NAT leaves the mark alone: a part behind it begins with the mark that the part before left, though its
// packet is seen at its end only.
func TestMarkBehindNAT(t *testing.T) {
	const missed = bpf.NftraceRecFlagREC_F_NFTMISSED
	marked := func(mark uint32, p bpf.NftracePkt) bpf.NftracePkt { p.Mark = mark; return p }
	three, five := marked(3, ping()), marked(5, dnatted())
	tables := []string{"filter"}
	counted := part{hook: HookLocalOut, tables: tables, runs: -1, hits: []bpf.NftraceHit{hit(0, 1, 1)}}
	uncounted := part{hook: HookLocalOut, tables: tables, runs: -1}
	behind := counted
	behind.before = &five
	nothing := func(*script) {}
	flagged := func(p part, f bpf.NftraceRecFlag) func(*script) {
		return func(s *script) { p.flags |= f; s.part(p) }
	}
	for _, tt := range []struct {
		name   string
		first  func(*script) // the part before NAT
		lose   func(*script) // what comes between NAT and the part behind it
		behind func(*script)
		mark   uint32 // the part began with
		known  bool
	}{
		{"as at the call", flagged(uncounted, 0), nothing, flagged(behind, 0), 0, true},
		{"marked before", func(s *script) { s.part(counted); s.after(three) }, nothing, flagged(behind, 0), 3, true},
		{"marked by nf_tables before", func(s *script) { s.saw(3, 0); s.nft(nftRule(5, NFAccept)); s.part(uncounted) }, nothing, flagged(behind, 0), 3, true},
		{"no tables before", func(s *script) { s.first(HookLocalOut, 0) }, nothing, flagged(behind, 0), 0, true},
		{"not seen before", func(s *script) { s.first(HookForward, 0); s.part(part{hook: HookLocalOut}) }, nothing, flagged(behind, 0), 5, false},
		{"a record of nf_tables is lost before", func(s *script) { s.seq++; s.nft(nftRule(5, NFAccept)); s.part(uncounted) }, nothing, flagged(behind, 0), 5, false},
		{"all that nf_tables did is missed before", flagged(uncounted, missed), nothing, flagged(behind, 0), 5, false},
		{"some of it, and a rule counted the packet", flagged(counted, missed), nothing, flagged(behind, 0), 0, true},
		{"some of it, and some is told", func(s *script) { s.nft(nftRule(5, NFAccept)); flagged(uncounted, missed)(s) }, nothing, flagged(behind, 0), 0, true},
		{"what the tables did is not known before", flagged(uncounted, bpf.NftraceRecFlagREC_F_TORN), nothing, flagged(behind, 0), 5, false},
		{"not known, but a rule counted the packet", flagged(counted, bpf.NftraceRecFlagREC_F_TORN), nothing, flagged(behind, 0), 0, true},
		{"what was behind it is lost", func(s *script) { s.part(counted); s.seq++ }, nothing, flagged(behind, 0), 5, false},
		{"nf_tables' words behind it are lost", flagged(uncounted, 0), func(s *script) { s.seq++; s.nft(nftRule(5, NFAccept)) }, flagged(behind, 0), 5, false},
		{"nf_tables' words behind it are missed", flagged(uncounted, 0), nothing, flagged(behind, missed), 0, false},
		{"its hook's record is lost", func(s *script) { s.filter(HookPreRouting); s.seq++; s.after(three) }, nothing, flagged(behind, 0), 5, false},
		{"twice", func(s *script) {
			s.part(counted)
			s.after(three)
			s.nat(0)
			s.part(part{hook: HookLocalOut, before: &three})
		}, nothing, flagged(behind, 0), 3, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.first(s)
			s.nat(1)
			tt.lose(s)
			tt.behind(s)
			s.xmit()
			s.end(0)
			j := s.journey()
			i := len(j.Steps) - 1
			for j.Steps[i].Table == nil || j.Steps[i].Table.NFT != nil {
				i--
			}
			run := j.Steps[i].Table
			p := run.Part
			if run.Before.Mark != tt.mark || p.Before.Mark != tt.mark || p.MarkKnown != tt.known {
				t.Errorf("mark %d, the table's %d, known %v; want %d, %v", p.Before.Mark, run.Before.Mark, p.MarkKnown, tt.mark, tt.known)
			}
			if !p.AfterNAT || p.Before.Data[19] != 9 {
				t.Errorf("the packet before NAT: %+v", p)
			}
			switch end := p.End; {
			case tt.mark == 5 && end != nil, tt.mark != 5 && (end == nil || end.Mark != 5 || end.Data[19] != 9):
				t.Errorf("at its end %+v", end)
			case p.After != nil && p.After.Mark != 5:
				t.Errorf("behind it %+v", p.After)
			}
		})
	}
}

// The packet behind a part: what its record says, else what it was before, and nothing
// where it was gone.
func TestAfter(t *testing.T) {
	marked := ping()
	marked.Mark = 7
	for _, tt := range []struct {
		name  string
		after bool
		next  func(s *script)
		want  int // mark, -1: not known
	}{
		{"changed", true, func(s *script) { s.xmit() }, 7},
		{"not changed", false, func(s *script) { s.xmit() }, 0},
		{"dropped", false, func(s *script) { s.drop() }, -1},
		{"gone", false, func(s *script) { s.end(0) }, -1},
		{"changed, and dropped", true, func(s *script) { s.drop() }, 7},
	} {
		s := newScript(t, NewAssembler(), 7)
		s.filter(HookForward)
		if tt.after {
			s.after(marked)
		}
		tt.next(s)
		s.end(0)
		p := s.journey().Steps[0].Table.Part.After
		if known := p != nil; known != (tt.want >= 0) || known && p.Mark != uint32(tt.want) {
			t.Errorf("%s: %+v, want mark %d", tt.name, p, tt.want)
		}
	}
	// Where nobody looked, it may have changed.
	s := newScript(t, NewAssembler(), 7)
	s.part(part{hook: HookForward, flags: bpf.NftraceRecFlagREC_F_UNSEEN, tables: []string{"filter"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
	s.xmit()
	s.end(0)
	if p := s.journey().Steps[0].Table.Part.After; p != nil {
		t.Errorf("it was not seen behind the hook: %+v", p)
	}
	// Of a hook that was lost.
	s = newScript(t, NewAssembler(), 7)
	s.filter(HookForward)
	s.seq++
	s.after(marked)
	s.xmit()
	s.end(0)
	if p := s.journey().Steps[0].Table.Part.After; p != nil {
		t.Errorf("the packet behind another hook, or before this one, was taken: %+v", p)
	}
}

// Conntrack comes to know a packet behind table raw; before, the packet has no state.
func TestTracked(t *testing.T) {
	const entry = bpf.NftraceRecFlagREC_F_TRACKED
	known := ping()
	known.Flags, known.Ctinfo = uint8(bpf.NftracePktFlagPKT_F_CT), 2
	rewritten := dnatted()
	rewritten.Flags, rewritten.Ctinfo = known.Flags, known.Ctinfo
	untracked := known
	untracked.Ctinfo = 7
	both := []bpf.NftraceHit{hit(0, 1, 1), hit(1, 1, 1)}
	nothing := func(s *script) {}
	for _, tt := range []struct {
		name        string
		p           part
		before      func(s *script) // nil: nothing
		next        func(s *script)
		raw, mangle string
	}{
		{"seen behind the hook", part{hits: both}, nil, func(s *script) { s.after(known) }, "", "NEW"},
		{"seen behind NAT", part{hook: HookLocalOut, hits: both}, nil,
			func(s *script) { s.nat(1); s.part(part{hook: HookLocalOut, before: &rewritten}) }, "", "NEW"},
		{"not seen", part{hits: both}, nil, nothing, "", ""},
		{"at a hook without conntrack", part{hook: HookForward, hits: both}, nil, func(s *script) { s.after(known) }, "", ""},

		// What no REC_AFTER tells: that ctinfo is 0 as before.
		{"established", part{flags: entry, hits: both}, nil, nothing, "", "ESTABLISHED"},
		{"established, and NAT comes next", part{hook: HookLocalOut, flags: entry, hits: both}, nil, func(s *script) { s.nat(1) }, "", "ESTABLISHED"},
		{"new", part{flags: entry, hits: both}, nil, func(s *script) { s.after(known) }, "", "NEW"},
		{"without tracking", part{hits: both}, nil, func(s *script) { s.after(untracked) }, "", "UNTRACKED"},
		{"REC_AFTER is lost", part{flags: entry, hits: both}, nil, func(s *script) { s.seq++ }, "", ""},
		{"no rule counted it, so none comes", part{flags: entry | bpf.NftraceRecFlagREC_F_TORN}, nil, nothing, "", ""},
		{"known before", part{flags: entry, before: &known, hits: both}, nil, nothing, "NEW", "NEW"},
		{"a hook without conntrack, that one came in", part{hook: HookForward, flags: entry, hits: both}, nil, nothing, "", ""},
		{"nf_tables told, and did not change it", part{flags: entry, hits: both},
			func(s *script) { s.nft(nftRule(5, NFAccept)) }, nothing, "", "ESTABLISHED"},
		{"nf_tables saw it last", part{flags: entry, hits: both},
			func(s *script) { s.sawPacket(known, 0); s.nft(nftRule(5, NFAccept)) }, nothing, "", ""},
		{"nf_tables may have", part{flags: entry, hits: both}, func(s *script) { s.seq += 2 }, nothing, "", ""},
	} {
		s := newScript(t, NewAssembler(), 7)
		if tt.before != nil {
			tt.before(s)
		}
		tt.p.tables, tt.p.runs = []string{"raw", "mangle"}, -1
		s.part(tt.p)
		tt.next(s)
		s.xmit()
		s.end(0)
		got := map[string]string{}
		for _, st := range s.journey().Steps {
			if t := st.Table; t != nil && t.NFT == nil {
				got[t.Name] = t.Before.CT
			}
		}
		if raw, mangle := got["raw"], got["mangle"]; raw != tt.raw || mangle != tt.mangle {
			t.Errorf("%s: raw %q, mangle %q, want %q, %q", tt.name, raw, mangle, tt.raw, tt.mangle)
		}
	}
}

// What is known of a packet's connection behind a hook comes with the hook's record, its mark with
// the packet's.
func TestConnMark(t *testing.T) {
	known := ping()
	known.Flags = uint8(bpf.NftracePktFlagPKT_F_CT | bpf.NftracePktFlagPKT_F_CTMARK | bpf.NftracePktFlagPKT_F_CONFIRMED)
	known.CtMark = 9
	for _, flags := range []bpf.NftraceRecFlag{0, bpf.NftraceRecFlagREC_F_TRACKED} {
		s := newScript(t, NewAssembler(), 7)
		s.part(part{hook: HookPreRouting, flags: flags, tables: []string{"mangle"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 1, 1)}})
		s.after(known)
		s.xmit()
		s.end(0)
		p := s.journey().Steps[0].Table.Part
		if want := flags != 0; p.Tracked != want {
			t.Errorf("tracked: %v, want %v", p.Tracked, want)
		}
		if b, a := &p.Before, p.After; b.HasCTMark || b.CTConfirmed || b.CTMark != 0 || !a.HasCTMark || !a.CTConfirmed || a.CTMark != 9 {
			t.Errorf("before %+v, after %+v", b, a)
		}
	}
}

func TestBadRecords(t *testing.T) {
	var r bpf.NftraceRecHook
	r.Hdr.Type = uint16(bpf.NftraceRecTypeREC_HOOK)
	whole := unsafe.Offsetof(r.Hits)
	for _, tt := range []struct {
		name                    string
		ntables, nhits, ofTable int
		size                    uintptr
	}{
		{"cut off", 0, 0, 0, unsafe.Offsetof(r.Before) - 1},
		{"too many tables", 7, 0, 0, unsafe.Sizeof(r)},
		{"tables cut off", 1, 0, 0, whole - 1},
		{"hits cut off", 1, 2, 0, whole + 2*unsafe.Sizeof(r.Hits[0]) - 1},
		{"too many hits", 1, 513, 0, unsafe.Sizeof(r)},
		{"a hit of no table", 1, 1, 1, unsafe.Sizeof(r)},
	} {
		r.Ntables, r.Nhits = uint32(tt.ntables), uint32(tt.nhits)
		r.Hits[0].Table = uint16(tt.ofTable)
		a := NewAssembler()
		if _, err := a.Add(bytesOf(&r, tt.size)); err == nil || a.Stats().Bad != 1 {
			t.Errorf("%s: was taken: %v", tt.name, err)
		}
	}
}

func TestFragment(t *testing.T) {
	v4 := func(hi, lo byte) Packet {
		p := ping()
		p.Data[6], p.Data[7] = hi, lo
		return Packet{Family: PFIPv4, Data: p.Data[:28]}
	}
	v6 := func(next uint8, rest ...byte) Packet {
		b := make([]byte, 40, 40+len(rest))
		b[0], b[6] = 0x60, next
		return Packet{Family: PFIPv6, Data: append(b, rest...)}
	}
	for _, tt := range []struct {
		name string
		p    Packet
		want bool
	}{
		{"IPv4, may not be fragmented", v4(0x40, 0), false},
		{"IPv4, the first", v4(0x20, 0), true},
		{"IPv4, the last", v4(0, 1), true},
		{"IPv6", v6(17, 0, 0, 0, 0, 0, 0, 0, 0), false},
		{"IPv6, the first", v6(44, 17, 0, 0, 1, 0, 0, 0, 0), true},
		{"IPv6, with the header, but whole", v6(44, 17, 0, 0, 0, 0, 0, 0, 0), false},
		{"IPv6, behind another header", v6(0, 44, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 1), true},
		{"IPv6, cut off", v6(0, 44), false},
		{"neither", Packet{Data: make([]byte, 60)}, false},
	} {
		if got := tt.p.fragment(); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// The CPU may stand still between the two records that tell of a drop.
func TestDropThenEnd(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.filter(HookForward)
	s.header(bpf.NftraceRecTypeREC_DROP, 0)
	if early := s.a.Idle(time.Duration(s.now) + 2*settle); len(early) > 0 {
		t.Fatalf("it was handed out before its end: %s", shape(early[0]))
	}
	s.now += uint64(3 * settle)
	s.end(0)
	if j := s.journey(); j.HalfSeen != "" || j.Lost != 0 || j.Outcome.Kind != OutDropped {
		t.Errorf("half seen %q, lost %d, %v", j.HalfSeen, j.Lost, j.Outcome)
	}
}

// What was handed out is used again, for a journey that knows nothing of it.
func TestReuse(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	rewritten := dnatted()
	s.part(part{hook: HookLocalOut, flags: bpf.NftraceRecFlagREC_F_LATE, tables: []string{"nat", "filter"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
	s.after(rewritten)
	s.nat(1)
	s.part(part{hook: HookLocalOut, before: &rewritten, flags: bpf.NftraceRecFlagREC_F_TORN, tables: []string{"nat", "filter"}, runs: 1})
	s.seq++
	s.drop()
	first := a.Idle(time.Duration(s.now) + 2*settle)[0]
	runs := []*TableRun{first.Steps[0].Table, first.Steps[2].Table}
	parts := []*Part{runs[0].Part, runs[1].Part}
	nat := first.Steps[1].NAT
	for _, run := range runs { // as who resolves them does
		run.After, run.Hotdrop, run.Rules, run.Met = run.Before, "a match", []Rule{{}}, append(run.Met, Met{})
	}

	next := newScript(t, a, 8)
	next.now = s.now + uint64(3*settle)
	next.first(HookPreRouting, 0)
	next.part(part{hook: HookPreRouting, tables: []string{"raw"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 9, 1)}})
	next.nat(1)
	next.part(part{hook: HookPreRouting, before: &rewritten})
	next.end(0)
	j := a.Idle(time.Duration(next.now) + 2*settle)[0]
	if want := "PREROUTING=accept, raw=accept 9x1, nat 10.0.0.2>10.0.0.9, PREROUTING=?"; shape(j) != want {
		t.Fatalf("got  %s\nwant %s", shape(j), want)
	}
	run := j.Steps[1].Table
	if j != first || !slices.Contains(runs, run) || !slices.Contains(parts, run.Part) || j.Steps[2].NAT != nat {
		t.Error("not all was used again")
	}
	if j.ID != 8 || j.HalfSeen != "" || j.Lost != 0 || j.Outcome.Kind != OutFreed || j.First.Data[19] != 2 {
		t.Errorf("the journey has something of the one before: %+v", j)
	}
	if run.After != nil || run.Hotdrop != "" || len(run.Rules) != 0 || len(run.Met) != 0 {
		t.Errorf("the run has something of the one before: %+v", run)
	}
	if p := run.Part; p.AfterNAT || p.Verdict != NFAccept || p.After.Data[19] != 2 {
		t.Errorf("the part has something of the one before: %+v", p)
	}
}

// A record that comes when its journey was handed out begins another.
func TestTooLate(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.first(HookPreRouting, 0)
	s.end(0)
	s.journey()
	s.xmit()
	if js := a.Flush(1); len(js) != 1 || js[0].ID != 7 || len(js[0].Steps) != 1 || js[0].HalfSeen == "" {
		t.Errorf("Flush gave %+v", js)
	}
}

// In the long run a packet costs no memory.
func TestAllocations(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 0)
	rewritten := dnatted()
	tables := []string{"nat", "filter", "raw"}
	var records [][]byte
	s.keep = func(raw []byte) { records = append(records, copyOf(raw)) }
	s.part(part{hook: HookLocalOut, tables: tables, runs: 2, hits: []bpf.NftraceHit{hit(2, 5, 1), hit(0, 4, 1), hit(0, 3, 1)}})
	s.after(ping())
	s.nat(1)
	s.part(part{hook: HookLocalOut, before: &rewritten, tables: tables, runs: 1, hits: []bpf.NftraceHit{hit(1, 4, 1)}})
	s.xmit()
	s.part(part{hook: HookPreRouting})
	s.part(part{hook: HookForward, tables: tables, flags: bpf.NftraceRecFlagREC_F_TORN})
	s.drop()
	packets := 0
	one := func() {
		for _, raw := range records {
			h := (*bpf.NftraceRecHdr)(unsafe.Pointer(&raw[0]))
			h.Jid++
			h.Ts += uint64(2 * settle)
			js, err := a.Add(raw)
			if err != nil {
				t.Fatal(err)
			}
			packets += len(js)
		}
	}
	one()
	one()
	if n := testing.AllocsPerRun(100, one); n != 0 || packets < 100 {
		t.Errorf("%v allocations per packet of %d", n, packets)
	}
}

func TestTuple(t *testing.T) {
	v6 := func(next uint8, rest ...byte) Packet {
		b := make([]byte, 40, 40+len(rest))
		b[0], b[6] = 0x60, next
		b[23], b[39] = 1, 2
		return Packet{Family: PFIPv6, Data: append(b, rest...)}
	}
	addr := netip.MustParseAddr
	for _, tt := range []struct {
		name  string
		p     Packet
		want  Tuple
		later bool
	}{
		{"ICMP", Packet{Family: PFIPv4, Data: func() []byte { p := ping(); return p.Data[:28] }()},
			Tuple{1, netip.AddrPortFrom(addr("10.0.0.1"), 5), netip.AddrPortFrom(addr("10.0.0.2"), 5)}, false},
		{"cut off", Packet{Family: PFIPv4, Data: make([]byte, 19)}, Tuple{}, false},
		{"hop-by-hop, then UDP", v6(0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 54, 0, 8, 0, 0),
			Tuple{17, netip.AddrPortFrom(addr("::1"), 53), netip.AddrPortFrom(addr("::2"), 54)}, false},
		{"authentication, then UDP", v6(51, 17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 54, 0, 8, 0, 0),
			Tuple{17, netip.AddrPortFrom(addr("::1"), 53), netip.AddrPortFrom(addr("::2"), 54)}, false},
		{"authentication, cut off", v6(51, 17, 1, 0, 0, 0, 0, 0, 0, 0, 0),
			Tuple{51, netip.AddrPortFrom(addr("::1"), 0), netip.AddrPortFrom(addr("::2"), 0)}, false},
		{"later fragment", v6(44, 17, 0, 0, 8, 0, 0, 0, 1, 0, 53, 0, 54),
			Tuple{17, netip.AddrPortFrom(addr("::1"), 0), netip.AddrPortFrom(addr("::2"), 0)}, true},
	} {
		got, later := tt.p.Tuple()
		if got != tt.want || later != tt.later {
			t.Errorf("%s: %+v %v, want %+v %v", tt.name, got, later, tt.want, tt.later)
		}
	}
}

// Whatever comes out of the buffer: no panic, every journey is counted, and outcomes
// point at steps that there are.
func FuzzAdd(f *testing.F) {
	var r bpf.NftraceRecHook
	r.Hdr.Type = uint16(bpf.NftraceRecTypeREC_HOOK)
	r.Before = ping()
	f.Add(bytesOf(&r, unsafe.Offsetof(r.Nhits)))
	r.Ntables, r.Nhits, r.Runs = 2, 3, 2
	f.Add(bytesOf(&r, unsafe.Offsetof(r.Hits)+3*unsafe.Sizeof(r.Hits[0])))
	for _, run := range slices.Concat(nftScripts, ebtScripts) {
		// All of one length, which the last byte of all tells.
		const words = 50
		var raw []byte
		s := &script{t: f, jid: 7, keep: func(rec []byte) { raw = append(raw, append(rec, make([]byte, 1+8*words-len(rec))...)...) }}
		run(s)
		raw[len(raw)-1] = words
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		a := NewAssembler()
		var got uint64
		told, named := 0, 0 // records and events of nf_tables
		check := func(js []*Journey) {
			for _, j := range js {
				got++
				if o := j.Outcome; o.Step >= len(j.Steps) {
					t.Fatalf("outcome %+v of %d steps", o, len(j.Steps))
				}
				for i := range j.Steps {
					if s := &j.Steps[i]; s.Table != nil && s.Table.NFT != nil {
						named += checkNFT(t, s)
					}
				}
			}
		}
		// The input is a sequence of records, each as long as its last byte says.
		for len(raw) > 0 {
			n := min(len(raw), 1+int(raw[len(raw)-1])*8)
			rec := copyOf(raw[:n])
			raw = raw[n:]
			js, err := a.Add(rec)
			if h, _ := header(rec); err == nil && h.Type == uint16(bpf.NftraceRecTypeREC_NFT) {
				told++
			}
			check(js)
		}
		check(a.Flush(1))
		left := 0
		for range a.open.all {
			left++
		}
		if n := a.Stats().Packets; n != got || left != 0 {
			t.Fatalf("%d journeys came, %d were counted, %d are left", got, n, left)
		}
		if named > told {
			t.Fatalf("%d events of nf_tables of %d records", named, told)
		}
	})
}
