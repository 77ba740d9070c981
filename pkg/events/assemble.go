package events

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/nftrace/nftrace/bpf"
)

// settle is how long after its end a journey is kept open for records that still come.
const settle = 20 * time.Millisecond

// usualSteps is room for the steps of a packet that is forwarded through all tables.
const usualSteps = 20

// Assembler groups records into journeys. Its fields may be set before the first Add.
type Assembler struct {
	// OnRun, if set, is told of each run of a table as soon as its record is read:
	// which table it was and where, no more is known then. The step is valid during the
	// call only.
	OnRun func(*Step)

	open map[uint64]*draft // by journey
	last *draft            // the one of open that the newest record belonged to, if any
	// Those of open that ended, in the order of their ends.
	firstEnded, lastEnded *draft

	// What was handed out is valid until the next call, and then used again.
	done  []*Journey
	given []*draft
	spare []*draft
	runs  []*TableRun
	parts []*Part
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
	nextSeq uint32
	gap     bool // records are missing before the newest one
	call    call
	parts   []*Part // all packets of the journey are in them
	seen    *Packet // as it was seen last; nil: records are missing since
	// matched is set once the filter matched: the probes follow packets on
	// suspicion, and not all of them are wanted.
	matched bool
	endedAt time.Duration
	next    *draft // that ended
}

// call is the call of a hook that the newest record belongs to; what comes next tells
// how it ended.
type call struct {
	open bool
	hook Step // its StepHook
	// natted is set where nf_nat_manip_pkt was called behind the part, as nat says; the
	// next record is the next part.
	natted bool
	nat    bpf.NftraceRecNat

	// Of its last part:
	ended  bool
	part   *Part // nil: no tables
	first  int   // its first table in Steps
	runs   int   // of tables, as the kernel counted them; -1: it could not
	unseen bool  // what became of the packet is known only if REC_AFTER comes
	listed []listed
	seen   *Packet // nil: not known
}

// listed is a table that a hook can run through.
type listed struct {
	name string
	id   TableID
	rank uint8  // in the order in which the kernel runs them
	at   uint8  // in the record
	hits uint16 // of its rules
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
	a.endCall(d, VerdictUnknown)
	a.close(d)
	a.stats.Packets++
	a.stats.Lost += d.j.Lost
	for i := range d.j.Steps {
		// Of this device only the index is recorded; its name may have come later.
		if s := &d.j.Steps[i]; s.PhysIn.Index != 0 {
			s.PhysIn.Name = a.deviceName(s.Netns, s.PhysIn.Index)
		}
	}
	d.j.Conclude()
	a.done = append(a.done, &d.j)
}

// reuse makes room for new drafts of those that the last call gave away.
func (a *Assembler) reuse() {
	for _, d := range a.given {
		for i := range d.j.Steps {
			s := &d.j.Steps[i]
			if s.Table != nil {
				a.runs = append(a.runs, s.Table)
			}
			if s.NAT != nil {
				a.nats = append(a.nats, s.NAT)
			}
		}
		a.parts = append(a.parts, d.parts...)
		*d = draft{j: Journey{Steps: d.j.Steps[:0]}, parts: d.parts[:0], call: call{listed: d.call.listed[:0]}}
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

// draft returns the draft that a record belongs to.
func (a *Assembler) draft(h *bpf.NftraceRecHdr) *draft {
	d := a.open[h.Jid]
	if d == nil {
		d = a.newDraft()
		d.j.ID = h.Jid
		if h.Seq != 0 || bpf.NftraceRecType(h.Type) != bpf.NftraceRecTypeREC_HOOK {
			d.j.HalfSeen = "the record of its beginning was lost"
		}
		d.j.Start = ns(h.Ts)
		a.open[h.Jid] = d
	}
	a.last = d
	return d
}

func (a *Assembler) end(d *draft, at time.Duration) {
	if !d.j.ended {
		d.j.ended, d.endedAt = true, at
		if a.firstEnded == nil {
			a.firstEnded = d
		} else {
			a.lastEnded.next = d
		}
		a.lastEnded = d
	}
}

func (a *Assembler) record(h *bpf.NftraceRecHdr, raw []byte) error {
	d := a.last
	if d == nil || d.j.ID != h.Jid {
		d = a.draft(h)
	}
	if d.gap = h.Seq > d.nextSeq; d.gap {
		d.j.Lost += uint64(h.Seq - d.nextSeq)
		d.seen = nil
	}
	d.nextSeq = h.Seq + 1
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_TENTATIVE) == 0 {
		d.matched = true
	}
	switch bpf.NftraceRecType(h.Type) {
	case bpf.NftraceRecTypeREC_HOOK:
		return a.hook(d, h, raw)
	case bpf.NftraceRecTypeREC_AFTER:
		r, err := recPkt(raw)
		if err != nil {
			return err
		}
		// Else it is of a part that was lost.
		if p := d.call.part; p != nil && !d.call.ended && !d.gap {
			p.after = r.Pkt
			readPacket(&p.After, &p.after)
			d.see(&p.After)
			d.tracked(&p.After)
		}
	case bpf.NftraceRecTypeREC_NAT:
		r, err := recNAT(raw)
		if err != nil {
			return err
		}
		if c := &d.call; c.open && !d.gap {
			a.endPart(d, NFAccept)
			c.natted, c.nat = true, *r
		}
	case bpf.NftraceRecTypeREC_BRIDGE:
		return a.passed(d, StepBridge, h, raw)
	case bpf.NftraceRecTypeREC_XMIT:
		return a.passed(d, StepXmit, h, raw)
	case bpf.NftraceRecTypeREC_DELIVER:
		return a.passed(d, StepDeliver, h, raw)
	case bpf.NftraceRecTypeREC_DROP:
		if d.call.open && !d.gap {
			a.endCall(d, NFDrop)
		} else if !d.j.ended {
			a.endCall(d, VerdictUnknown)
			d.j.dropped = true
		}
		a.end(d, ns(h.Ts))
	case bpf.NftraceRecTypeREC_END:
		a.endCall(d, VerdictUnknown)
		a.end(d, ns(h.Ts))
	default:
		return fmt.Errorf("unknown type")
	}
	return nil
}

// addStep adds a step that is to be filled in where it stands: steps are large. The
// pointer is valid until the next one is added.
func (d *draft) addStep() *Step {
	n := len(d.j.Steps)
	if n == cap(d.j.Steps) {
		d.j.Steps = slices.Grow(d.j.Steps, 1)
	}
	d.j.Steps = d.j.Steps[:n+1]
	return &d.j.Steps[n]
}

// begin makes s a step of which no more is known than a record's header.
func (s *Step) begin(kind StepKind, h *bpf.NftraceRecHdr) {
	*s = Step{}
	s.Kind, s.Time, s.CPU, s.Netns = kind, ns(h.Ts), int(h.Cpu), h.Netns
}

// passed adds a step that is no more than a device.
func (a *Assembler) passed(d *draft, kind StepKind, h *bpf.NftraceRecHdr, raw []byte) error {
	r, err := recDev(raw)
	if err != nil {
		return err
	}
	a.endCall(d, NFAccept)
	s := d.addStep()
	s.begin(kind, h)
	if kind == StepDeliver {
		a.device(&s.In, h.Netns, &r.Dev)
		a.end(d, s.Time)
	} else {
		a.device(&s.Out, h.Netns, &r.Dev)
	}
	return nil
}

// place fills in where a step was that is empty but for the header.
func (a *Assembler) place(s *Step, p *bpf.NftracePlace) {
	s.PF, s.Hook = p.Pf, p.Hook
	a.device(&s.In, s.Netns, &p.In)
	a.device(&s.Out, s.Netns, &p.Out)
	a.device(&s.PhysOut, s.Netns, &p.Physout)
	s.PhysIn.Index = int(p.Physin)
}

// hook takes a call of a hook or a part of one.
func (a *Assembler) hook(d *draft, h *bpf.NftraceRecHdr, raw []byte) error {
	r, hasBefore, hasTables, err := recHook(raw)
	if err != nil {
		return err
	}
	c := &d.call
	behind := c.open && c.natted && !d.gap
	// It may be gone before anybody could look at it behind the rewrite.
	hasBefore = hasBefore && (!behind || r.Before.Cap > 0)
	var p *Part
	if hasBefore || hasTables {
		p = a.newPart(d)
		p.AfterNAT = behind
	}
	if hasBefore {
		p.before = r.Before
		readPacket(&p.Before, &p.before)
		if d.j.First.Data == nil {
			d.j.First = p.Before
		}
	}
	if h.Seq == 0 {
		d.j.Start = ns(r.EntryTs)
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_LATE) != 0 {
			d.j.HalfSeen = "followed from " + HookName(r.Place.Pf, r.Place.Hook) + " on: the filter did not match before"
		}
	}

	if !behind {
		a.endCall(d, NFAccept)
	} else if hasBefore {
		d.tracked(&p.Before)
		a.nat(d, &p.Before)
	}
	if hasBefore {
		d.see(&p.Before)
	}
	c.hook.begin(StepHook, h)
	c.hook.Verdict = VerdictUnknown
	a.place(&c.hook, &r.Place)
	c.open, c.natted, c.ended, c.part = true, false, false, nil
	c.first, c.listed, c.seen = len(d.j.Steps), c.listed[:0], d.seen
	if hasTables {
		c.part = p
		a.tablesOf(d, r)
	}
	return nil
}

func (a *Assembler) newPart(d *draft) *Part {
	p := pop(&a.parts)
	if p == nil {
		p = &Part{}
	}
	// What it has slices of need not be cleared.
	p.Before, p.After, p.AfterNAT, p.Verdict = Packet{}, Packet{}, false, VerdictUnknown
	d.parts = append(d.parts, p)
	return p
}

// see takes note of the packet as it was seen last.
func (d *draft) see(p *Packet) { d.seen, d.j.seen = p, p }

// tracked sets the conntrack state of the packet in the tables of the last part, from
// the packet behind it: conntrack comes to know it between table raw and the others.
func (d *draft) tracked(p *Packet) {
	c := &d.call
	if c.part == nil || c.hook.Hook != HookPreRouting && c.hook.Hook != HookLocalOut {
		return
	}
	for i := c.first; i < len(d.j.Steps); i++ {
		if t := d.j.Steps[i].Table; t != nil && t.Name != "raw" {
			t.Before.CT, t.Before.CTReply = p.CT, p.CTReply
		}
	}
}

// nat adds the step of the rewrite that the next part of the call lies behind.
func (a *Assembler) nat(d *draft, after *Packet) {
	c := &d.call
	if c.seen == nil {
		return
	}
	n := NAT{Source: c.nat.Manip == 0, CTReply: c.nat.Dir != 0}
	n.Before, _ = c.seen.Tuple()
	n.After, _ = after.Tuple()
	if !fits(&n) || n.Before == n.After {
		return
	}
	s := d.addStep()
	s.begin(StepNAT, &c.nat.Hdr)
	if s.NAT = pop(&a.nats); s.NAT == nil {
		s.NAT = &NAT{}
	}
	*s.NAT = n
}

// fits reports that a rewrite can have made After of Before: the packet may have been
// changed otherwise (put into a tunnel) since it was Before.
func fits(n *NAT) bool {
	if !n.Before.Src.Addr().IsValid() || n.Before.Proto != n.After.Proto {
		return false
	}
	if n.Source {
		return n.Before.Dst.Addr() == n.After.Dst.Addr()
	}
	return n.Before.Src.Addr() == n.After.Src.Addr()
}

// rank orders tables as the kernel runs them at a hook (enum nf_ip_hook_priorities);
// early is set where destinations are rewritten, not sources.
func rank(table string, early bool) uint8 {
	switch table {
	case "raw":
		return 0
	case "mangle":
		return 1
	case "nat":
		if early {
			return 2
		}
		return 6
	case "filter":
		return 3
	case "security":
		return 4
	}
	return 5
}

// tablesOf adds the tables of a part, as far as they are known before its end is.
func (a *Assembler) tablesOf(d *draft, r *bpf.NftraceRecHook) {
	c := &d.call
	early := 0
	if c.hook.Hook == HookPreRouting || c.hook.Hook == HookLocalOut {
		early = 1
	}
	hits := r.Hits[:r.Nhits]
	var of [len(r.Tables)]uint16 // hits of each table
	for i := range hits {
		of[hits[i].Table]++
	}
	for i := range r.Tables[:r.Ntables] {
		t := &r.Tables[i]
		k := a.table(&t.Name)
		l := listed{name: k.name, id: TableID{Private: t.Private, Gen: t.Gen}, rank: k.ranks[early], at: uint8(i), hits: of[i]}
		c.listed = append(c.listed, l)
		for n := i; n > 0 && c.listed[n-1].rank > l.rank; n-- {
			c.listed[n], c.listed[n-1] = c.listed[n-1], l
		}
	}
	why := unresolved(r.Hdr.Flags)
	c.unseen = r.Hdr.Flags&uint32(bpf.NftraceRecFlagREC_F_UNSEEN) != 0
	if c.runs = int(r.Runs); why != "" || r.Hdr.Flags&uint32(bpf.NftraceRecFlagREC_F_UNCOUNTED) != 0 {
		c.runs = -1
	}
	for i := range c.listed {
		l := &c.listed[i]
		if l.hits > 0 || why != "" && l.name != "nat" {
			t := a.run(d, l)
			t.Unresolved = why
			t.Hits = hitsOf(t.Hits, l, hits)
		}
	}
}

// hitsOf adds a table's hits to what is empty, sorted and those of one entry added up.
func hitsOf(to []Hit, l *listed, hits []bpf.NftraceHit) []Hit {
	to = slices.Grow(to, int(l.hits))
	sorted := true
	for i := range hits {
		h := &hits[i]
		if h.Table != uint16(l.at) {
			continue
		}
		n := len(to)
		sorted = sorted && (n == 0 || to[n-1].Index < int(h.Index))
		to = append(to, Hit{Index: int(h.Index), Packets: uint64(h.Packets), Bytes: h.Bytes})
	}
	if sorted {
		return to
	}
	slices.SortFunc(to, func(x, y Hit) int { return cmp.Compare(x.Index, y.Index) })
	out := to[:0]
	for _, h := range to {
		if n := len(out); n > 0 && out[n-1].Index == h.Index {
			out[n-1].Packets += h.Packets
			out[n-1].Bytes += h.Bytes
			continue
		}
		out = append(out, h)
	}
	return out
}

// run adds a run of a table in the last part of the open call.
func (a *Assembler) run(d *draft, l *listed) *TableRun {
	c := &d.call
	t := pop(&a.runs)
	if t == nil {
		t = &TableRun{}
	}
	hits, rules := t.Hits[:0], t.Rules[:0]
	*t = TableRun{}
	t.Name, t.ID, t.Hits, t.Rules = l.name, l.id, hits, rules
	t.Part, t.Before = c.part, c.part.Before
	s := d.addStep()
	*s = c.hook
	s.Kind, s.Table = StepTable, t
	if a.OnRun != nil {
		a.OnRun(s)
	}
	return t
}

// unusable are the causes why the counters of a part cannot be used at all.
var unusable = []struct {
	flag  bpf.NftraceRecFlag
	cause string
}{
	{bpf.NftraceRecFlagREC_F_NOTABLE, "the table has more rules than nftrace made room for when it started; start it again"},
	{bpf.NftraceRecFlagREC_F_REPLACED, "the table was replaced while the packet was in it"},
	{bpf.NftraceRecFlagREC_F_TORN, "another packet ran through the tables while the counters were being copied"},
	{bpf.NftraceRecFlagREC_F_FAULT, "the table's counters could not be read"},
	{bpf.NftraceRecFlagREC_F_TOOMANY, "more rules matched than a record holds"},
}

func unresolved(flags uint32) string {
	if flags == 0 {
		return "" // as nearly all are
	}
	for i := range unusable {
		if flags&uint32(unusable[i].flag) != 0 {
			return unusable[i].cause
		}
	}
	return ""
}

// endPart ends the last part of the open call: verdict is NFAccept if the packet went
// on, be it to the next part.
func (a *Assembler) endPart(d *draft, verdict int) {
	c := &d.call
	if c.part == nil || c.ended {
		return
	}
	c.ended = true
	c.part.Verdict = verdict
	if verdict == NFAccept && c.part.After.Data == nil && !d.gap && !c.unseen {
		c.part.After = c.part.Before
	}
	a.countRuns(d, verdict)
	// All tables but the last accepted it, and if it went on, the last one too.
	last, known := true, true
	for i := len(d.j.Steps) - 1; i >= c.first; i-- {
		known = known && d.j.Steps[i].Table.Unresolved == ""
	}
	for i := len(d.j.Steps) - 1; i >= c.first; i-- {
		s := &d.j.Steps[i]
		switch {
		case verdict == NFAccept || known && !last:
			s.Verdict = NFAccept
		case known && len(s.Table.Hits) == 0:
			s.Verdict = NFDrop
		}
		last = false
	}
}

// countRuns compares the tables of the last part with what the kernel counted.
func (a *Assembler) countRuns(d *draft, verdict int) {
	c := &d.call
	with := len(d.j.Steps) - c.first
	if c.runs < 0 || c.runs == with {
		return
	}
	next := -1 // the table behind the last one with hits
	for i := len(c.listed) - 1; i >= 0 && c.listed[i].hits == 0; i-- {
		if c.listed[i].name != "nat" {
			next = i
		}
	}
	if verdict == NFDrop && c.runs == with+1 && next >= 0 {
		// A match dropped the packet before any rule of this table counted it.
		a.run(d, &c.listed[next])
		return
	}
	const why = "other packets ran through the tables unseen"
	if with == 0 && next >= 0 {
		a.run(d, &c.listed[next])
	}
	for i := c.first; i < len(d.j.Steps); i++ {
		d.j.Steps[i].Table.Unresolved = why
	}
}

// endCall ends the open call, if there is one, and adds its verdict.
func (a *Assembler) endCall(d *draft, verdict int) {
	c := &d.call
	if !c.open {
		return
	}
	a.endPart(d, verdict)
	c.hook.Verdict = verdict
	*d.addStep() = c.hook
	c.open = false
}

// Conclude works the outcome out from the last steps. It is to be called again where
// the verdicts of tables have become known since.
func (j *Journey) Conclude() {
	o := Outcome{Kind: OutUnknown, Step: -1, Rule: -1}
	if j.ended {
		o.Kind = OutFreed
	}
	last := len(j.Steps) - 1
	switch {
	case j.dropped:
		o.Kind = OutDropped
	case last < 0:
	case j.Steps[last].Kind == StepDeliver:
		o.Kind, o.Device = OutDelivered, j.Steps[last].In
	case j.Steps[last].Kind == StepXmit && j.ended:
		o.Kind, o.Device, o.Step = OutSent, j.Steps[last].Out, last
	case j.Steps[last].Kind == StepHook:
		j.concludeHook(&o, last)
	}
	j.Outcome = o
}

// concludeHook is the outcome of a journey that ended in step i, a StepHook.
func (j *Journey) concludeHook(o *Outcome, i int) {
	s := &j.Steps[i]
	table, said := -1, VerdictUnknown
	if i > 0 && j.Steps[i-1].Kind == StepTable {
		table, said = i-1, j.Steps[i-1].Verdict
	}
	switch {
	case s.Verdict == NFDrop:
		o.Kind, o.Step = OutDropped, i
		if said == NFDrop {
			o.Step = table
		}
	case s.Verdict != VerdictUnknown:
	case said == NFDrop:
		o.Kind, o.Step = OutDropped, table
	case said == NFStolen:
		o.Kind, o.Step = OutStolen, table
	case said == NFQueue:
		o.Kind, o.Step = OutQueued, table
	case j.ended && j.seen != nil && (s.PF == PFIPv4 || s.PF == PFIPv6) && (s.Hook == HookPreRouting || s.Hook == HookLocalOut) && j.seen.fragment():
		// It waits for the others, or waited in vain.
		o.Kind, o.Step = OutStolen, i
	}
}
