package events

import (
	"bytes"
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
// overlapped on a CPU. Step.Table is never nil.
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

	open   map[uint64]*draft // by journey
	ended  []*draft          // in the order of their ends
	names  map[ifaceKey]string
	tables map[string]string // the names of tables
	now    time.Duration     // of the newest record
	stats  Stats
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
	nextSeq uint32
	natPre  *bpf.NftracePkt
	// matched is set once the filter matched: the probes follow packets on
	// suspicion, and not all of them are wanted.
	matched bool
	ended   bool
	endedAt time.Duration
}

// NewAssembler returns an empty Assembler.
func NewAssembler() *Assembler {
	return &Assembler{open: map[uint64]*draft{}, names: map[ifaceKey]string{}, tables: map[string]string{}}
}

// Stats returns the counts so far.
func (a *Assembler) Stats() Stats { return a.stats }

// Add takes one record, which it does not keep, and returns the journeys that are
// complete with it.
func (a *Assembler) Add(raw []byte) ([]*Journey, error) {
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
	if len(a.ended) > 0 && a.now-a.ended[0].endedAt > settle {
		return a.takeEnded(a.now - settle), nil
	}
	return nil, nil
}

// Idle is to be called when no records are left in the buffer at time now (since
// boot, CLOCK_MONOTONIC): it returns the journeys that ended long enough ago.
func (a *Assembler) Idle(now time.Duration) []*Journey {
	a.now = max(a.now, now)
	return a.takeEnded(a.now - settle)
}

// Flush returns all journeys, ended or not.
func (a *Assembler) Flush() []*Journey {
	done := a.takeEnded(1<<63 - 1)
	var rest []*draft
	for _, d := range a.open {
		if d.matched {
			rest = append(rest, d)
		}
	}
	clear(a.open)
	slices.SortFunc(rest, func(x, y *draft) int { return cmp.Compare(x.j.ID, y.j.ID) })
	for _, d := range rest {
		done = append(done, a.finish(d))
	}
	return done
}

func (a *Assembler) takeEnded(until time.Duration) []*Journey {
	var done []*Journey
	for len(a.ended) > 0 && a.ended[0].endedAt <= until {
		if d := a.ended[0]; d.matched {
			done = append(done, a.finish(d))
		} else {
			delete(a.open, d.j.ID)
		}
		a.ended = a.ended[1:]
	}
	return done
}

func (a *Assembler) finish(d *draft) *Journey {
	delete(a.open, d.j.ID)
	a.stats.Packets++
	a.stats.Lost += d.j.Lost
	for i := range d.j.Steps {
		// Of this device only the index is recorded; its name may have come later.
		if s := &d.j.Steps[i]; s.PhysIn.Index != 0 {
			s.PhysIn.Name = a.names[ifaceKey{s.Netns, s.PhysIn.Index}]
		}
	}
	d.j.Outcome = outcome(d)
	return &d.j
}

func (a *Assembler) draft(h *bpf.NftraceRecHdr) *draft {
	d := a.open[h.Jid]
	if d == nil {
		if h.Seq == seqAfterEnd {
			return nil // the journey was handed out; a hook far up returned
		}
		d = &draft{}
		d.j.ID = h.Jid
		d.j.Steps = make([]Step, 0, usualSteps)
		if bpf.NftraceRecType(h.Type) != bpf.NftraceRecTypeREC_START {
			d.j.HalfSeen = "the record of its beginning was lost"
		}
		d.j.Start = ns(h.Ts)
		a.open[h.Jid] = d
	}
	if h.Seq != seqAfterEnd {
		if h.Seq > d.nextSeq {
			d.j.Lost += uint64(h.Seq - d.nextSeq)
		}
		d.nextSeq = h.Seq + 1
	}
	return d
}

func (a *Assembler) end(d *draft, at time.Duration) {
	if !d.ended {
		d.ended, d.endedAt = true, at
		a.ended = append(a.ended, d)
	}
}

func (a *Assembler) record(h *bpf.NftraceRecHdr, raw []byte) error {
	typ := bpf.NftraceRecType(h.Type)
	if typ == bpf.NftraceRecTypeREC_FOREIGN {
		return a.table(nil, h, raw)
	}
	d := a.draft(h)
	if d == nil {
		return nil
	}
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_TENTATIVE) == 0 && h.Seq != seqAfterEnd {
		d.matched = true
	}
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_HOLE) != 0 {
		d.j.Lost++
	}
	step := Step{Time: ns(h.Ts), CPU: int(h.Cpu), Netns: h.Netns}
	switch typ {
	case bpf.NftraceRecTypeREC_START:
		r, err := recHook(bytes.Clone(raw), true)
		if err != nil {
			return err
		}
		d.j.First = packet(&r.Pkt)
		a.place(&step, &r.Place)
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_LATE) != 0 {
			d.j.HalfSeen = "followed from " + HookName(step.PF, step.Hook) + " on: the filter did not match before"
		}
	case bpf.NftraceRecTypeREC_HOOK:
		r, err := recHook(raw, false)
		if err != nil {
			return err
		}
		step.Kind = StepHook
		a.place(&step, &r.Place)
		step.Verdict = hookVerdict(r.Ret)
		d.j.Steps = append(d.j.Steps, step)
	case bpf.NftraceRecTypeREC_TABLE:
		return a.table(d, h, raw)
	case bpf.NftraceRecTypeREC_AFTER:
		r, err := recPkt(bytes.Clone(raw))
		if err != nil {
			return err
		}
		if n := len(d.j.Steps); n > 0 && d.j.Steps[n-1].Table != nil {
			d.j.Steps[n-1].Table.After = packet(&r.Pkt)
		}
	case bpf.NftraceRecTypeREC_NAT:
		r, err := recNAT(bytes.Clone(raw))
		if err != nil {
			return err
		}
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_NAT_AFTER) == 0 {
			d.natPre = &r.Pkt
			return nil
		}
		a.nat(d, &step, r)
	case bpf.NftraceRecTypeREC_BRIDGE, bpf.NftraceRecTypeREC_XMIT, bpf.NftraceRecTypeREC_DELIVER:
		r, err := recDev(raw)
		if err != nil {
			return err
		}
		dev := a.device(step.Netns, &r.Dev)
		switch typ {
		case bpf.NftraceRecTypeREC_BRIDGE:
			step.Kind, step.Out = StepBridge, dev
		case bpf.NftraceRecTypeREC_XMIT:
			step.Kind, step.Out = StepXmit, dev
		default:
			step.Kind, step.In = StepDeliver, dev
			a.end(d, step.Time)
		}
		d.j.Steps = append(d.j.Steps, step)
	case bpf.NftraceRecTypeREC_END:
		a.end(d, step.Time)
	default:
		return fmt.Errorf("unknown type")
	}
	return nil
}

func (a *Assembler) place(s *Step, p *bpf.NftracePlace) {
	s.PF, s.Hook = p.Pf, p.Hook
	s.In, s.Out = a.device(s.Netns, &p.In), a.device(s.Netns, &p.Out)
	s.PhysIn, s.PhysOut = Device{Index: int(p.Physin)}, a.device(s.Netns, &p.Physout)
}

func (a *Assembler) table(d *draft, h *bpf.NftraceRecHdr, raw []byte) error {
	r, err := recTable(bytes.Clone(raw))
	if err != nil {
		return err
	}
	step := Step{
		Kind: StepTable, Time: ns(h.Ts), CPU: int(h.Cpu), Netns: h.Netns,
		Verdict: int(r.Verdict),
	}
	a.place(&step, &r.Place)
	t := &TableRun{
		Name:   a.tableName(r.Table[:]),
		ID:     TableID{Private: r.Private, Gen: r.Gen},
		Before: packet(&r.Before),
		Hits:   make([]Hit, r.Nhits),
	}
	for i := range t.Hits {
		hit := &r.Hits[i]
		t.Hits[i] = Hit{Index: int(hit.Index), Packets: uint64(hit.Packets), Bytes: hit.Bytes}
	}
	has := func(f bpf.NftraceRecFlag) bool { return h.Flags&uint32(f) != 0 }
	if has(bpf.NftraceRecFlagREC_F_ALIVE) {
		t.After = t.Before
	}
	t.Shared = has(bpf.NftraceRecFlagREC_F_SHARED)
	t.Unresolved = unresolved(has)
	step.Table = t
	if a.OnRun != nil {
		run := step
		a.OnRun(Run{
			Step: &run, Entry: ns(r.EntryTs), Exit: step.Time,
			Alone: has(bpf.NftraceRecFlagREC_F_ATOMIC),
		})
	}
	if d == nil {
		return nil
	}
	t.Entry = ns(r.EntryTs)
	d.j.Steps = append(d.j.Steps, step)
	return nil
}

// unresolved says why the counters of a run cannot be used at all.
func unresolved(has func(bpf.NftraceRecFlag) bool) string {
	switch {
	case has(bpf.NftraceRecFlagREC_F_MISSED_ENTRY):
		return "the kernel skipped the probe at the table's entry"
	case has(bpf.NftraceRecFlagREC_F_MIGRATED):
		return "the packet's task moved to another CPU within the table"
	case has(bpf.NftraceRecFlagREC_F_NOTABLE):
		return "the table has more rules than nftrace made room for when it started; start it again"
	case has(bpf.NftraceRecFlagREC_F_REPLACED):
		return "the table was replaced while the packet was in it"
	case has(bpf.NftraceRecFlagREC_F_TORN):
		return "another packet ran through the tables while the counters were being copied"
	case has(bpf.NftraceRecFlagREC_F_FAULT):
		return "the table's counters could not be read"
	case has(bpf.NftraceRecFlagREC_F_TOOMANY):
		return "more rules matched than a record holds"
	}
	return ""
}

func (a *Assembler) nat(d *draft, step *Step, r *bpf.NftraceRecNat) {
	if d.natPre == nil {
		return
	}
	before, after := packet(d.natPre), packet(&r.Pkt)
	d.natPre = nil
	step.Kind = StepNAT
	step.NAT = &NAT{
		Source:  r.Manip == 0,
		CTReply: r.Dir != 0,
	}
	step.NAT.Before, _ = before.Tuple()
	step.NAT.After, _ = after.Tuple()
	if step.NAT.Before != step.NAT.After {
		d.j.Steps = append(d.j.Steps, *step)
	}
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
