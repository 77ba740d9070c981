package events

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/nftrace/nftrace/bpf"
)

// settle is how long after its end a journey is kept open: the hook that dropped
// the packet returns after the packet is gone, and runs of tables that overlapped with
// its own may still be open.
const settle = 20 * time.Millisecond

// usualSteps is room for the steps of a packet that is forwarded through all tables.
const usualSteps = 20

// seqAfterEnd is the sequence number of records that come after the end.
const seqAfterEnd = ^uint32(0)

// Run is one run of a table as it was recorded, for those who must tell runs apart that
// overlapped on a CPU. Step.Table is never nil. A run that was alone is of no use to those,
// and valid during the call only; others may be kept.
type Run struct {
	Step *Step
	// Entry and Exit are the times of the two probes.
	Entry, Exit time.Duration
	// Alone is set where no other run can have fallen in between.
	Alone bool
}

// Assembler groups records into journeys. Its fields may be set before the first Add.
type Assembler struct {
	// OnRun, if set, is told of each run as soon as its record is read, of packets
	// that are followed and of others that overlapped with theirs.
	OnRun func(Run)

	open map[uint64]*draft // by journey
	last *draft            // the one of open that the newest record belonged to, if any
	// Those of open that ended, in the order of their ends.
	firstEnded, lastEnded *draft

	// What was handed out is valid until the next call, and then used again.
	done  []*Journey
	given []*draft
	spare []*draft
	runs  []*TableRun
	nats  []*NAT

	names   map[ifaceKey]string
	devices [256]knownDevice
	tables  []knownTable
	now     time.Duration // of the newest record
	stats   Stats
}

// Stats counts what an Assembler has seen.
type Stats struct {
	Packets uint64 // journeys handed out
	Records uint64
	Lost    uint64 // records that are missing in journeys
	Bad     uint64 // records that could not be read
}

type ifaceKey struct {
	netns uint32
	index int
}

// draft is a journey that is not complete.
type draft struct {
	j       Journey
	first   bpf.NftracePkt // j.First
	nextSeq uint32
	// natOpen is set where natBefore, what the packet was before NAT, waits for the after.
	natOpen   bool
	natBefore Tuple
	// matched is set once the filter matched: the probes follow packets on
	// suspicion, and not all of them are wanted.
	matched bool
	ended   bool
	endedAt time.Duration
	next    *draft // that ended
}

// NewAssembler returns an empty Assembler.
func NewAssembler() *Assembler {
	return &Assembler{open: map[uint64]*draft{}, names: map[ifaceKey]string{}}
}

// Stats returns the counts so far.
func (a *Assembler) Stats() Stats { return a.stats }

// Add takes one record, which it does not keep, and returns the journeys that are
// complete with it. They are valid until the next call of Add, Idle or Flush.
func (a *Assembler) Add(raw []byte) ([]*Journey, error) {
	if len(a.given) > 0 {
		a.reuse()
	}
	a.stats.Records++
	h, err := header(raw)
	if err != nil {
		a.stats.Bad++
		return nil, err
	}
	a.now = max(a.now, ns(h.Ts))
	if err := a.record(h, raw); err != nil {
		a.stats.Bad++
		return nil, fmt.Errorf("record of type %d: %w", h.Type, err)
	}
	if a.firstEnded != nil {
		a.takeEnded(a.now - settle)
	}
	return a.done, nil
}

// Idle is to be called when no records are left in the buffer at time now (since
// boot, CLOCK_MONOTONIC): it returns the journeys that ended long enough ago, as Add does.
func (a *Assembler) Idle(now time.Duration) []*Journey {
	a.reuse()
	a.now = max(a.now, now)
	a.takeEnded(a.now - settle)
	return a.done
}

// Flush returns all journeys, ended or not, as Add does.
func (a *Assembler) Flush() []*Journey {
	a.reuse()
	a.takeEnded(1<<63 - 1)
	var rest []*draft
	for _, d := range a.open {
		if d.matched {
			rest = append(rest, d)
		}
	}
	slices.SortFunc(rest, func(x, y *draft) int { return cmp.Compare(x.j.ID, y.j.ID) })
	for _, d := range rest {
		a.finish(d)
	}
	clear(a.open)
	a.last = nil
	return a.done
}

func (a *Assembler) takeEnded(until time.Duration) {
	for d := a.firstEnded; d != nil && d.endedAt <= until; d = a.firstEnded {
		a.firstEnded = d.next
		if d.matched {
			a.finish(d)
		} else {
			a.close(d)
		}
	}
}

// close forgets a draft.
func (a *Assembler) close(d *draft) {
	delete(a.open, d.j.ID)
	if a.last == d {
		a.last = nil
	}
	a.given = append(a.given, d)
}

// finish hands out a draft's journey.
func (a *Assembler) finish(d *draft) {
	a.close(d)
	a.stats.Packets++
	a.stats.Lost += d.j.Lost
	for i := range d.j.Steps {
		// Of this device only the index is recorded; its name may have come later.
		if s := &d.j.Steps[i]; s.PhysIn.Index != 0 {
			s.PhysIn.Name = a.deviceName(s.Netns, s.PhysIn.Index)
		}
	}
	d.j.Outcome = outcome(d)
	a.done = append(a.done, &d.j)
}

// reuse makes room for new drafts of those that the last call gave away.
func (a *Assembler) reuse() {
	for _, d := range a.given {
		for i := range d.j.Steps {
			s := &d.j.Steps[i]
			if s.Table != nil && !s.Table.kept {
				a.runs = append(a.runs, s.Table)
			}
			if s.NAT != nil {
				a.nats = append(a.nats, s.NAT)
			}
		}
		*d = draft{j: Journey{Steps: d.j.Steps[:0]}}
	}
	a.spare = append(a.spare, a.given...)
	a.given, a.done = a.given[:0], a.done[:0]
}

func (a *Assembler) newDraft() *draft {
	if d := pop(&a.spare); d != nil {
		return d
	}
	return &draft{j: Journey{Steps: make([]Step, 0, usualSteps)}}
}

// pop takes the last of a list, or returns nil if there is none.
func pop[T any](list *[]*T) *T {
	n := len(*list)
	if n == 0 {
		return nil
	}
	last := (*list)[n-1]
	*list = (*list)[:n-1]
	return last
}

// draft finds the draft that a record belongs to, if there is one or it can begin one.
func (a *Assembler) draft(h *bpf.NftraceRecHdr) *draft {
	d := a.open[h.Jid]
	if d == nil {
		if h.Seq == seqAfterEnd {
			return nil // the journey was handed out; a hook far up returned
		}
		d = a.newDraft()
		d.j.ID = h.Jid
		if bpf.NftraceRecType(h.Type) != bpf.NftraceRecTypeREC_START {
			d.j.HalfSeen = "the record of its beginning was lost"
		}
		d.j.Start = ns(h.Ts)
		a.open[h.Jid] = d
	}
	a.last = d
	return d
}

func (a *Assembler) end(d *draft, at time.Duration) {
	if !d.ended {
		d.ended, d.endedAt = true, at
		if a.firstEnded == nil {
			a.firstEnded = d
		} else {
			a.lastEnded.next = d
		}
		a.lastEnded = d
	}
}

func (a *Assembler) record(h *bpf.NftraceRecHdr, raw []byte) error {
	typ := bpf.NftraceRecType(h.Type)
	if typ == bpf.NftraceRecTypeREC_FOREIGN {
		return a.table(nil, h, raw)
	}
	d := a.last
	if d == nil || d.j.ID != h.Jid {
		if d = a.draft(h); d == nil {
			return nil
		}
	}
	if h.Seq != seqAfterEnd {
		if h.Seq > d.nextSeq {
			d.j.Lost += uint64(h.Seq - d.nextSeq)
		}
		d.nextSeq = h.Seq + 1
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_TENTATIVE) == 0 {
			d.matched = true
		}
	}
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_HOLE) != 0 {
		d.j.Lost++
	}
	switch typ {
	case bpf.NftraceRecTypeREC_START:
		r, err := recHook(raw, true)
		if err != nil {
			return err
		}
		d.first = r.Pkt
		readPacket(&d.j.First, &d.first)
		// It is no step, but may name devices of which others know the index only.
		begin := Step{Netns: h.Netns}
		a.place(&begin, &r.Place)
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_LATE) != 0 {
			d.j.HalfSeen = "followed from " + HookName(begin.PF, begin.Hook) + " on: the filter did not match before"
		}
	case bpf.NftraceRecTypeREC_HOOK:
		r, err := recHook(raw, false)
		if err != nil {
			return err
		}
		s := d.step(StepHook, h)
		a.place(s, &r.Place)
		s.Verdict = hookVerdict(r.Ret)
	case bpf.NftraceRecTypeREC_TABLE:
		return a.table(d, h, raw)
	case bpf.NftraceRecTypeREC_AFTER:
		r, err := recPkt(raw)
		if err != nil {
			return err
		}
		if n := len(d.j.Steps); n > 0 && d.j.Steps[n-1].Table != nil {
			after := r.Pkt
			readPacket(&d.j.Steps[n-1].Table.After, &after)
		}
	case bpf.NftraceRecTypeREC_NAT:
		r, err := recNAT(raw)
		if err != nil {
			return err
		}
		a.nat(d, h, r)
	case bpf.NftraceRecTypeREC_BRIDGE:
		return a.passed(d, StepBridge, h, raw)
	case bpf.NftraceRecTypeREC_XMIT:
		return a.passed(d, StepXmit, h, raw)
	case bpf.NftraceRecTypeREC_DELIVER:
		return a.passed(d, StepDeliver, h, raw)
	case bpf.NftraceRecTypeREC_END:
		a.end(d, ns(h.Ts))
	default:
		return fmt.Errorf("unknown type")
	}
	return nil
}

// step adds a step. The pointer is valid until the next one is added.
func (d *draft) step(kind StepKind, h *bpf.NftraceRecHdr) *Step {
	n := len(d.j.Steps)
	if n == cap(d.j.Steps) {
		d.j.Steps = slices.Grow(d.j.Steps, 1)
	}
	d.j.Steps = d.j.Steps[:n+1]
	s := &d.j.Steps[n]
	*s = Step{} // filled in where it stands: steps are large
	s.Kind, s.Time, s.CPU, s.Netns = kind, ns(h.Ts), int(h.Cpu), h.Netns
	return s
}

// passed adds a step that is no more than a device.
func (a *Assembler) passed(d *draft, kind StepKind, h *bpf.NftraceRecHdr, raw []byte) error {
	r, err := recDev(raw)
	if err != nil {
		return err
	}
	s := d.step(kind, h)
	if kind == StepDeliver {
		a.device(&s.In, h.Netns, &r.Dev)
		a.end(d, s.Time)
	} else {
		a.device(&s.Out, h.Netns, &r.Dev)
	}
	return nil
}

// place fills in where an empty step was.
func (a *Assembler) place(s *Step, p *bpf.NftracePlace) {
	s.PF, s.Hook = p.Pf, p.Hook
	a.device(&s.In, s.Netns, &p.In)
	a.device(&s.Out, s.Netns, &p.Out)
	a.device(&s.PhysOut, s.Netns, &p.Physout)
	s.PhysIn.Index = int(p.Physin)
}

// table adds a run of a table; d is nil if the packet is not followed.
func (a *Assembler) table(d *draft, h *bpf.NftraceRecHdr, raw []byte) error {
	r, err := recTable(raw)
	if err != nil {
		return err
	}
	if d == nil {
		d = &draft{}
	}
	s := d.step(StepTable, h)
	s.Verdict = int(r.Verdict)
	a.place(s, &r.Place)
	has := func(f bpf.NftraceRecFlag) bool { return h.Flags&uint32(f) != 0 }
	alone := has(bpf.NftraceRecFlagREC_F_ATOMIC)
	var t *TableRun
	if alone {
		t = a.newRun()
	} else {
		t = &TableRun{} // OnRun may keep it
	}
	hits, rules := t.Hits[:0], t.Rules[:0]
	*t = TableRun{} // as in step
	t.Name, t.ID, t.Entry = a.tableName(&r.Table), TableID{Private: r.Private, Gen: r.Gen}, ns(r.EntryTs)
	t.Hits, t.Rules = slices.Grow(hits, int(r.Nhits)), rules
	t.Shared, t.Unresolved, t.kept = has(bpf.NftraceRecFlagREC_F_SHARED), unresolved(h.Flags), !alone
	for i := range r.Hits[:r.Nhits] {
		hit := &r.Hits[i]
		t.Hits = append(t.Hits, Hit{Index: int(hit.Index), Packets: uint64(hit.Packets), Bytes: hit.Bytes})
	}
	t.before = r.Before
	readPacket(&t.Before, &t.before)
	if has(bpf.NftraceRecFlagREC_F_ALIVE) {
		t.After = t.Before
	}
	s.Table = t
	if a.OnRun != nil {
		if !alone {
			kept := *s
			s = &kept
		}
		a.OnRun(Run{Step: s, Entry: t.Entry, Exit: s.Time, Alone: alone})
	}
	return nil
}

func (a *Assembler) newRun() *TableRun {
	if t := pop(&a.runs); t != nil {
		return t
	}
	return &TableRun{}
}

// unusable are the causes why the counters of a run cannot be used at all.
var unusable = []struct {
	flag  bpf.NftraceRecFlag
	cause string
}{
	{bpf.NftraceRecFlagREC_F_MISSED_ENTRY, "the kernel skipped the probe at the table's entry"},
	{bpf.NftraceRecFlagREC_F_MIGRATED, "the packet's task moved to another CPU within the table"},
	{bpf.NftraceRecFlagREC_F_NOTABLE, "the table has more rules than nftrace made room for when it started; start it again"},
	{bpf.NftraceRecFlagREC_F_REPLACED, "the table was replaced while the packet was in it"},
	{bpf.NftraceRecFlagREC_F_TORN, "another packet ran through the tables while the counters were being copied"},
	{bpf.NftraceRecFlagREC_F_FAULT, "the table's counters could not be read"},
	{bpf.NftraceRecFlagREC_F_TOOMANY, "more rules matched than a record holds"},
}

func unresolved(flags uint32) string {
	if flags == uint32(bpf.NftraceRecFlagREC_F_ALIVE|bpf.NftraceRecFlagREC_F_ATOMIC) {
		return "" // as nearly all are
	}
	for i := range unusable {
		if flags&uint32(unusable[i].flag) != 0 {
			return unusable[i].cause
		}
	}
	return ""
}

// nat takes the packet before or after a rewrite; both make a step.
func (a *Assembler) nat(d *draft, h *bpf.NftraceRecHdr, r *bpf.NftraceRecNat) {
	var p Packet
	readPacket(&p, &r.Pkt)
	tuple, _ := p.Tuple()
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_NAT_AFTER) == 0 {
		d.natBefore, d.natOpen = tuple, true
		return
	}
	if d.natOpen && d.natBefore != tuple {
		n := pop(&a.nats)
		if n == nil {
			n = &NAT{}
		}
		*n = NAT{Source: r.Manip == 0, CTReply: r.Dir != 0, Before: d.natBefore, After: tuple}
		d.step(StepNAT, h).NAT = n
	}
	d.natOpen = false
}

// hookVerdict maps what nf_hook_slow returned (1: accepted, below 0: dropped with
// that errno, 0: stolen or queued) to NF_*.
func hookVerdict(ret int32) int {
	switch {
	case ret == 1:
		return NFAccept
	case ret < 0:
		return NFDrop
	default:
		return NFStolen
	}
}

// outcome tells what became of the packet from its last steps.
func outcome(d *draft) Outcome {
	o := Outcome{Kind: OutUnknown, Step: -1, Rule: -1}
	steps := d.j.Steps
	for i := len(steps) - 1; i >= 0; i-- {
		s := &steps[i]
		switch s.Kind {
		case StepDeliver:
			o.Kind, o.Device = OutDelivered, s.In
			return o
		case StepXmit:
			// What a hook of the next namespace kept was not just sent.
			if d.ended && (o.Kind != OutStolen || steps[o.Step].Netns == s.Netns) {
				o.Kind, o.Device, o.Step = OutSent, s.Out, i
			}
			return o
		case StepTable:
			if v := s.Verdict & 0xff; v != NFAccept {
				o.Step = i
				switch v {
				case NFDrop:
					o.Kind = OutDropped
				case NFStolen:
					o.Kind = OutStolen
				case NFQueue:
					o.Kind = OutQueued
				}
				return o
			}
		case StepHook:
			// Hooks further up return later, and say that it was stolen.
			if s.Verdict == NFDrop {
				o.Kind, o.Step = OutDropped, i
				// The table that said so, if one did, comes before.
				for k := i - 1; k >= 0; k-- {
					t := &steps[k]
					if t.Kind == StepTable && t.Hook == s.Hook && t.PF == s.PF && t.Verdict&0xff == NFDrop {
						o.Step = k
						break
					}
				}
				return o
			}
			// br_netfilter's own hooks steal what the IP hooks go on with.
			if s.Verdict == NFStolen && o.Kind == OutUnknown && s.PF != PFBridge {
				o.Kind, o.Step = OutStolen, i
			}
		}
	}
	if d.ended && o.Kind == OutUnknown {
		o.Kind = OutFreed
	}
	return o
}
