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

// underWay is the most packets that the probes follow at once (journeys in bpf/maps.h). Where many
// more are open, the records of ends were lost.
const underWay = 16384

// usualSteps is room for the steps of a packet that is forwarded through all tables.
const usualSteps = 20

// maxSteps is how long a journey gets, by a step or two.
const maxSteps = 1 << 10

// Assembler groups records into journeys. Its fields may be set before the first Add.
type Assembler struct {
	// OnRun, if set, is told of a run of a table as soon as its record is read, unless it
	// was told of one of the same pattern: which table it was and where, no more is known
	// then. The step is valid during the call only.
	OnRun func(*Step)
	// PortName, if set, is asked for the name of a bridge port of a packet that is wanted, where no
	// record has it; "" if it is not known.
	PortName func(netns uint32, index int) string

	open   openDrafts
	opened int    // how many there are in it
	last   *draft // the one of open that the newest record belonged to, if any
	// Those of open that ended, in the order of their ends.
	firstEnded, lastEnded *draft

	// What was handed out is valid until the next call, and then used again.
	done  []*Journey
	given []*draft
	spare []*draft

	names    map[ifaceKey]string
	devices  [256]knownDevice
	named    int // how many times a device got a name
	renamed  int // how many times it had another one before
	patterns [1 << patternBits][2]*Pattern
	now      time.Duration // of the newest record
	newest   time.Duration // see Newest
	stats    Stats
}

// Stats counts what an Assembler has seen.
type Stats struct {
	Packets uint64 // journeys handed out
	Records uint64
	Lost    uint64 // records that are missing in journeys
	Skipped uint64 // of Lost: hooks at which the kernel may have skipped all calls of nf_tables' probe
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
	call    call
	parts   pool[Part] // all packets of the journey are in them
	runs    pool[TableRun]
	nats    pool[NAT]
	shots   pool[shot]
	nft     nftPending
	named   int     // Assembler.named when the journey began
	seen    *Packet // as it was seen last; nil: records are missing since
	// matched is set once the filter matched: the probes follow packets on
	// suspicion, and not all of them are wanted.
	matched bool
	hooked  bool   // a hook's record came
	unnamed bool   // a hook's bridge port has no name yet
	skipped uint64 // as Stats has it
	endedAt time.Duration
	lastAt  time.Duration // when the newest record came
	next    *draft        // that ended
	beside  *draft        // in one list of openDrafts
}

// call is the call of a hook that the newest record belongs to; what comes next tells
// how it ended.
type call struct {
	open bool
	// Of its newest record:
	time    time.Duration
	cpu     int
	pattern *Pattern
	// natted is set where nf_nat_manip_pkt was called behind the part, as nat says; the
	// next record is the next part.
	natted bool
	nat    bpf.NftraceRecNat
	// lost is set where records are missing behind that one. mayDiffer is set where something that
	// the tables or nf_tables did in the part may be missing, which may have changed the packet unseen.
	lost, mayDiffer bool
	// skipped is set where one of its parts counts among those that are skipped, as Stats has it:
	// what the next part says of that may be the same.
	skipped bool

	// Of its last part:
	ended bool
	part  *Part   // nil: no tables, and its packet is not known
	flow  int     // its StepFlowtable in Steps; -1: none
	size  int     // of the packet, as the bytes of the tables' hits have it
	first int     // its first table of xtables in Steps
	seen  *Packet // nil: not known
	// nftVerdict is that of the last base chain of nf_tables or table of ebtables in it, and nftSeen the packet
	// behind that, if it was seen there.
	nftVerdict int
	nftSeen    *Packet
	// established is set where the packet, which had no conntrack entry before, has one behind it: if
	// no REC_AFTER comes its ctinfo is still 0, which is IP_CT_ESTABLISHED of an entry (same_data in
	// bpf/packet.h).
	established bool
	// floor is the highest rank of those tables that ran at the same hook before a queue; -1: none.
	floor int
}

// NewAssembler returns an empty Assembler.
func NewAssembler() *Assembler {
	return &Assembler{names: map[ifaceKey]string{}}
}

// Stats returns the counts so far.
func (a *Assembler) Stats() Stats { return a.stats }

// Newest is until when, at the latest, records were made of packets that are wanted (CLOCK_MONOTONIC); 0: there are none.
func (a *Assembler) Newest() time.Duration { return a.newest }

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
	if d := a.firstEnded; d != nil && d.endedAt <= a.now-settle {
		a.takeEnded(a.now - settle)
	}
	if d := a.last; d != nil && len(d.j.Steps) >= maxSteps && !d.call.open && !d.j.ended {
		a.cut(d)
	}
	if a.opened > 2*underWay {
		a.finishSilent()
	}
	return a.done, nil
}

// cut hands out what a packet did so far that may go round forever, as between bridges that make a
// loop; what comes next is a journey of its own.
func (a *Assembler) cut(d *draft) {
	next := a.newDraft()
	next.j.ID, next.j.Start = d.j.ID, a.now
	next.j.HalfSeen = "it goes on and on, perhaps in a loop: what it did before was told already"
	// What it points to is used again.
	next.j.First = d.j.First
	next.j.First.Data, next.j.First.MAC = slices.Clone(d.j.First.Data), slices.Clone(d.j.First.MAC)
	next.nextSeq, next.lastAt, next.named = d.nextSeq, d.lastAt, a.named
	next.matched, next.hooked = d.matched, true
	a.release(d)
	a.open.add(next)
	a.opened++
	a.last = next
}

// Idle is to be called when no records are left in the buffer at time now (since
// boot, CLOCK_MONOTONIC): it returns the journeys that ended long enough ago, as Add does.
func (a *Assembler) Idle(now time.Duration) []*Journey {
	a.reuse()
	a.now = max(a.now, now)
	a.takeEnded(a.now - settle)
	return a.done
}

// Flush returns all journeys, ended or not, as Add does; live is how many packets are followed still.
func (a *Assembler) Flush(live uint64) []*Journey {
	a.reuse()
	a.takeEnded(1<<63 - 1)
	var rest []*draft
	for d := range a.open.all {
		if d.matched {
			rest = append(rest, d)
		}
	}
	slices.SortFunc(rest, func(x, y *draft) int { return cmp.Compare(x.j.ID, y.j.ID) })
	for _, d := range rest {
		if live == 0 {
			d.j.Lost++ // that of its end
		}
		a.finish(d)
	}
	a.open, a.opened = openDrafts{}, 0
	a.last = nil
	return a.done
}

// finishSilent finishes the journeys that were not heard of for longest, until no more are left than
// there can be: records of their ends were lost.
func (a *Assembler) finishSilent() {
	a.takeEnded(a.now)
	var silent []*draft
	for d := range a.open.all {
		if !d.j.ended && d != a.last {
			silent = append(silent, d)
		}
	}
	slices.SortFunc(silent, func(x, y *draft) int { return cmp.Compare(x.lastAt, y.lastAt) })
	for _, d := range silent[:max(0, len(silent)-underWay)] {
		d.j.Lost++
		a.release(d)
	}
}

func (a *Assembler) takeEnded(until time.Duration) {
	for d := a.firstEnded; d != nil && d.endedAt <= until; d = a.firstEnded {
		a.firstEnded = d.next
		a.release(d)
	}
}

// release hands out a draft's journey if it is wanted, and forgets it else.
func (a *Assembler) release(d *draft) {
	if d.matched {
		a.finish(d)
	} else {
		a.close(d)
	}
}

// close forgets a draft.
func (a *Assembler) close(d *draft) {
	a.open.remove(d)
	a.opened--
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
	a.stats.Skipped += d.skipped
	if d.named != a.named || d.unnamed {
		// Of a bridge port only the index is recorded; its name may have come later.
		for i := range d.j.Steps {
			p := d.j.Steps[i].Place
			a.name(p)
			if p.unnamed() && a.PortName != nil {
				a.askName(p)
			}
		}
	}
	d.j.Conclude()
	a.done = append(a.done, &d.j)
}

// reuse makes room for new drafts of those that the last call gave away.
func (a *Assembler) reuse() {
	for _, d := range a.given {
		d.parts.used, d.runs.used, d.nats.used, d.shots.used = 0, 0, 0, 0
		d.nft.reset()
		*d = draft{j: Journey{Steps: d.j.Steps[:0]}, parts: d.parts, runs: d.runs, nats: d.nats, shots: d.shots, nft: d.nft}
	}
	a.spare = append(a.spare, a.given...)
	a.given, a.done = a.given[:0], a.done[:0]
}

func (a *Assembler) newDraft() *draft {
	n := len(a.spare)
	if n == 0 {
		return &draft{j: Journey{Steps: make([]Step, 0, usualSteps)}}
	}
	d := a.spare[n-1]
	a.spare = a.spare[:n-1]
	return d
}

// pool has what was made for one journey and is used again for the next.
type pool[T any] struct {
	all  []*T
	used int
}

// take returns one that nobody uses.
func (p *pool[T]) take() *T {
	if p.used == len(p.all) {
		p.all = append(p.all, new(T))
	}
	t := p.all[p.used]
	p.used++
	return t
}

// draft returns the draft that a record belongs to.
func (a *Assembler) draft(h *bpf.NftraceRecHdr) *draft {
	d := a.open.find(h.Jid)
	if d == nil {
		d = a.newDraft()
		d.j.ID = h.Jid
		if h.Seq != 0 || !begins(bpf.NftraceRecType(h.Type)) {
			d.j.HalfSeen = "the record of its beginning was lost"
		}
		d.j.First.VLAN = -1 // and all else is as it is in the zero value, until it is known
		d.j.Start, d.named = ns(h.Ts), a.named
		a.open.add(d)
		a.opened++
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
	if h.Seq > d.nextSeq {
		d.j.Lost += uint64(h.Seq - d.nextSeq)
		d.seen, d.call.lost = nil, true
		// The record of their hook may be among those that are missing.
		d.nft.reset()
		d.nft.gap = true
	}
	d.nextSeq = h.Seq + 1
	d.lastAt = a.now
	if h.Flags&uint32(bpf.NftraceRecFlagREC_F_TENTATIVE) == 0 {
		d.matched, a.newest = true, a.now
	}
	switch bpf.NftraceRecType(h.Type) {
	case bpf.NftraceRecTypeREC_NFT:
		return d.addNFT(raw)
	case bpf.NftraceRecTypeREC_EBT:
		return d.addEBT(raw)
	case bpf.NftraceRecTypeREC_SEEN:
		r, err := recPkt(raw)
		if err != nil {
			return err
		}
		d.addShot(&r.Pkt, h.Flags&uint32(bpf.NftraceRecFlagREC_F_BETWEEN) != 0)
		return nil
	case bpf.NftraceRecTypeREC_FLOW:
		r, err := recFlow(raw)
		if err != nil {
			return err
		}
		d.nft.flow = &Flowtable{r.Family, string(cBytes(r.Table[:])), string(cBytes(r.Name[:]))}
		return nil
	}
	err := a.step(d, h, raw)
	// Whatever it was, what nf_tables tells from here on is of another hook.
	d.nft.reset()
	return err
}

// step takes a record of anything but nf_tables.
func (a *Assembler) step(d *draft, h *bpf.NftraceRecHdr, raw []byte) error {
	switch bpf.NftraceRecType(h.Type) {
	case bpf.NftraceRecTypeREC_HOOK:
		return a.hook(d, h, raw)
	case bpf.NftraceRecTypeREC_AFTER:
		r, err := recPkt(raw)
		if err != nil {
			return err
		}
		// Else it is of a part that was lost.
		if p := d.call.part; p != nil && !d.call.ended && !d.call.lost {
			p.rawAfter = r.Pkt
			readPacket(&p.after, &p.rawAfter)
			p.After = &p.after
			d.see(p.After)
			d.tracked(p.After)
			d.rewritten(p)
			if d.call.pattern.place.Hook == HookLocalOut && !p.AfterNAT && otherDst(p) {
				// What is known of other parts of this pattern is of another packet.
				p.NATUnseen, p.Pattern = true, nil
			}
		}
	case bpf.NftraceRecTypeREC_NAT:
		r, err := recNAT(raw)
		if err != nil {
			return err
		}
		if c := &d.call; c.open && !c.lost {
			c.natted, c.nat = true, *r
			d.dropUnrun()
			a.endPart(d, NFAccept)
		}
	case bpf.NftraceRecTypeREC_BRIDGE:
		return a.passed(d, StepBridge, h, raw)
	case bpf.NftraceRecTypeREC_XMIT:
		return a.passed(d, StepXmit, h, raw)
	case bpf.NftraceRecTypeREC_DELIVER:
		return a.passed(d, StepDeliver, h, raw)
	case bpf.NftraceRecTypeREC_DROP:
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_REINJECTED) != 0 {
			a.endCall(d, VerdictUnknown)
			d.j.refused = true
			return nil
		}
		// REC_END comes next, but perhaps not at once: the CPU may have stood still.
		if d.call.open && !d.call.lost {
			a.endCall(d, NFDrop)
		} else if !d.j.ended {
			a.endCall(d, VerdictUnknown)
			d.j.dropped = true
		}
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

// set makes s a step of which no more is known.
func (s *Step) set(p *Place, kind StepKind, at time.Duration, cpu int) {
	s.Place, s.Table, s.NAT, s.Flowtable, s.NetnsName = p, nil, nil, nil, ""
	s.Kind, s.Time, s.CPU, s.Verdict = kind, at, cpu, VerdictUnknown
}

// passed adds a step that is no more than a device.
func (a *Assembler) passed(d *draft, kind StepKind, h *bpf.NftraceRecHdr, raw []byte) error {
	r, err := recDev(raw)
	if err != nil {
		return err
	}
	if kind == StepXmit && d.sentOn() {
		a.endCall(d, NFStolen)
	}
	a.endCall(d, NFAccept)
	k := a.known(h.Netns, &r.Dev)
	s := d.addStep()
	*s = Step{Place: k.out, Kind: kind, Time: ns(h.Ts), CPU: int(h.Cpu)}
	if kind == StepDeliver {
		s.Place = k.in
		a.end(d, s.Time)
	}
	return nil
}

// hook takes a call of a hook or a part of one.
func (a *Assembler) hook(d *draft, h *bpf.NftraceRecHdr, raw []byte) error {
	r, hits, hasBefore, hasTables, err := recHook(raw)
	if err != nil {
		return err
	}
	c := &d.call
	pattern, kept, err := a.pattern(r, raw, hits)
	if err != nil {
		return err
	}
	// NAT does not run behind it: that would be another packet's, where the end of one was not seen.
	split := h.Flags&uint32(bpf.NftraceRecFlagREC_F_SPLIT) != 0 && !pattern.nat
	behind := split && c.open && c.natted && !c.lost
	missed := h.Flags&uint32(bpf.NftraceRecFlagREC_F_NFTMISSED) != 0
	// It may be gone before anybody could look at it behind the rewrite.
	hasBefore = hasBefore && (!split || r.Before.Cap > 0)
	var p *Part
	if hasBefore || hasTables || len(d.nft.events) > 0 {
		p = d.parts.take()
		p.After, p.AfterNAT, p.NATUnseen, p.Changed, p.Verdict, p.Pattern = nil, split, false, false, VerdictUnknown, nil
		p.End, p.MarkKnown = nil, false
		p.Unseen = pattern.unseen
		p.Tracked = h.Flags&uint32(bpf.NftraceRecFlagREC_F_TRACKED) != 0
		if hasBefore {
			p.rawBefore = r.Before
			readPacket(&p.Before, &p.rawBefore)
			if d.j.First.Data == nil {
				d.j.First = p.Before
			}
		} else {
			p.Before = Packet{}
		}
	}
	if !d.hooked {
		d.hooked = true
		d.j.Start = ns(r.EntryTs)
		if h.Flags&uint32(bpf.NftraceRecFlagREC_F_LATE) != 0 {
			why := ": the filter did not match before"
			if pattern.place.Reinjected {
				why = ", where it came out of a queue: a piece of a packet, or one that the filter did not match before"
			}
			d.j.HalfSeen = "followed from " + HookName(r.Place.Pf, r.Place.Hook) + " on" + why
		}
	}

	if !behind {
		floor := -1
		if c.open && samePlace(&c.pattern.place, &pattern.place) {
			floor = c.ranUpTo()
		}
		if r.Place.Pf == PFNetdev && r.Place.Hook == HookEgress && d.sentOn() {
			a.endCall(d, NFStolen)
		}
		a.endCall(d, NFAccept)
		c.floor, c.skipped = floor, false
	} else if hasBefore {
		d.tracked(&p.Before)
		a.nat(d, &p.Before)
	}
	if hasBefore {
		d.see(&p.Before)
		if behind {
			d.markOf(p, missed)
		}
	}
	a.name(&pattern.place)
	d.unnamed = d.unnamed || pattern.place.unnamed()
	c.open, c.natted, c.ended, c.pattern, c.part = true, false, false, pattern, p
	// Where a rule counted the packet, or nf_tables told of it, a REC_AFTER tells if it was changed.
	untold := len(hits)+len(d.nft.events) == 0
	c.lost, c.mayDiffer = false, d.nft.gap || untold && (missed || pattern.unresolved != "")
	c.time, c.cpu = ns(h.Ts), int(h.Cpu)
	c.nftVerdict, c.nftSeen, c.flow = NFAccept, nil, -1
	if len(d.nft.events) > 0 {
		a.nftRuns(d, p)
	} else if missed && !c.skipped {
		// Perhaps all that it did here.
		c.skipped = true
		d.j.Lost++
		d.skipped++
	}
	if d.nft.flow != nil {
		c.flow = len(d.j.Steps)
		s := d.addStep()
		s.set(&pattern.place, StepFlowtable, c.time, c.cpu)
		s.Flowtable = d.nft.flow
	}
	c.first, c.seen = len(d.j.Steps), d.seen
	if hasTables {
		c.size = pattern.size
		if kept {
			c.size = int(r.Before.Len)
			if hasBefore && !p.Changed && !(p.Unseen && r.Place.Hook == HookLocalOut) {
				p.Pattern = pattern
			}
		}
		a.tablesOf(d)
	}
	// That is compared where a rule counted the packet, with what nf_tables saw last.
	c.established = hasTables && len(hits) > 0 && p.Tracked && !split && p.Before.CT == "" &&
		c.nftSeen == nil && !d.nft.gap
	return nil
}

// markOf gives the packet of a part behind NAT, which was seen at its end, the mark that the part
// before left: NAT leaves it alone. missed is whether something that nf_tables did may be missing.
func (d *draft) markOf(p *Part, missed bool) {
	before := d.call.part
	if before == nil || before.After == nil {
		return
	}
	p.MarkKnown = !missed
	if mark := before.After.Mark; mark != p.Before.Mark {
		p.after = p.Before
		p.End, p.Before.Mark = &p.after, mark
	}
}

// see takes note of the packet as it was seen last.
func (d *draft) see(p *Packet) { d.seen, d.j.seen = p, p }

// tracked sets the conntrack state of the packet in the tables of the last part, from
// the packet behind it: conntrack comes to know it between table raw and the others.
func (d *draft) tracked(p *Packet) {
	c := &d.call
	if c.part == nil || !rewritesDst(c.pattern.place.Hook) {
		return
	}
	for i := c.first; i < len(d.j.Steps); i++ {
		if t := d.j.Steps[i].Table; t != nil && t.Name != "raw" {
			t.SetBefore(t.Before, p.CT, p.CTReply)
		}
	}
}

// nat adds the step of the rewrite that the next part of the call lies behind.
func (a *Assembler) nat(d *draft, after *Packet) {
	c := &d.call
	if c.seen == nil {
		return
	}
	n := rewriteOf(c.seen, after)
	n.Source, n.CTReply = c.nat.Manip == 0, c.nat.Dir != 0
	if !fits(&n) || n.Before == n.After {
		return
	}
	h := &c.nat.Hdr
	s := d.addStep()
	*s = Step{Place: a.known(h.Netns, &bpf.NftraceDev{}).in, Kind: StepNAT, Time: ns(h.Ts), CPU: int(h.Cpu)}
	s.NAT = d.nats.take()
	*s.NAT = n
}

// rewritten tells what the flowtable that sent the packet out of a part made of it.
func (d *draft) rewritten(p *Part) {
	if d.call.flow < 0 {
		return
	}
	n := rewriteOf(&p.Before, p.After)
	// It may also have put the packet behind a header, or taken it from behind one (VLAN, PPPoE,
	// a tunnel): then these are not the same addresses before and after.
	same := n.Before.Proto == n.After.Proto && n.Before.Src.Addr().IsValid() && n.After.Src.Addr().IsValid()
	if same && n.Before != n.After {
		to := d.nats.take()
		*to = n
		d.j.Steps[d.call.flow].NAT = to
	}
}

// otherDst reports that the packet had another destination behind the part than before it, and else
// was the same.
func otherDst(p *Part) bool {
	n := rewriteOf(&p.Before, p.After)
	return fits(&n) && n.Before.Dst != n.After.Dst && p.Before.Len == p.After.Len // else in a tunnel
}

// rewriteOf is a rewrite that made after of before.
func rewriteOf(before, after *Packet) (n NAT) {
	n.Before, _ = before.Tuple()
	n.After, _ = after.Tuple()
	return n
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

// rewritesDst tells whether NAT rewrites destinations at a hook, not sources.
func rewritesDst(hook uint8) bool { return hook == HookPreRouting || hook == HookLocalOut }

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

// ranUpTo is the highest rank of those tables that certainly ran in a call; -1: none did.
func (c *call) ranUpTo() int {
	up := c.floor
	if c.part != nil && c.part.AfterNAT {
		up = max(up, int(rank("nat", rewritesDst(c.pattern.place.Hook))))
	}
	for i := range c.pattern.listed {
		if l := &c.pattern.listed[i]; len(l.hits) > 0 && c.pattern.unresolved == "" {
			up = max(up, int(l.rank))
		}
	}
	return up
}

// sentOn tells whether the open call is one at a device's ingress from where the packet, which goes out
// next, was sent on without a word: nf_tables tells of a chain at its end at the latest, but where the
// first rule that matches is "fwd to" it finds the packet gone.
func (d *draft) sentOn() bool {
	c := &d.call
	if !c.open || c.lost || c.mayDiffer || c.pattern.place.PF != PFNetdev || c.pattern.place.Hook != HookIngress {
		return false
	}
	last := len(d.j.Steps) - 1
	return last < 0 || d.j.Steps[last].Kind != StepTable && d.j.Steps[last].Kind != StepFlowtable // of this call
}

// samePlace tells whether a call goes on with what is left of the one before it, behind a queue that
// took the packet or refused it.
func samePlace(p, q *Place) bool {
	return p.Hook == q.Hook && p.PF == q.PF && p.Netns == q.Netns && p.In == q.In && p.Out == q.Out
}

// mayRun tells whether a table can run in the last part: those up to nat do before NAT, the
// others behind it; and none again that ran before a queue, but for one that is to be repeated.
func (c *call) mayRun(table string) bool {
	early := rewritesDst(c.pattern.place.Hook)
	switch n := int(rank(table, early)); {
	case n < c.floor, n == c.floor && !c.pattern.place.Reinjected:
		return false
	}
	if rank(table, early) <= rank("nat", early) {
		return !c.part.AfterNAT
	}
	return !c.natted
}

// tablesOf adds the tables of a part, as far as they are known before its end is.
func (a *Assembler) tablesOf(d *draft) {
	p := d.call.pattern
	for _, i := range p.ran {
		a.run(d, &p.listed[i], !p.told)
	}
	p.told = true
	d.dropUnrun()
}

// dropUnrun takes back the tables that cannot have run in the last part, where its counters say
// nothing.
func (d *draft) dropUnrun() {
	c := &d.call
	if c.pattern.unresolved != "" {
		runs := slices.DeleteFunc(d.j.Steps[c.first:], func(s Step) bool { return !c.mayRun(s.Table.Name) })
		d.j.Steps = d.j.Steps[:c.first+len(runs)]
	}
}

// hitsOf returns the hits of the i-th table, sorted and those of one entry added up.
func hitsOf(hits []bpf.NftraceHit, i int) []Hit {
	var of []Hit
	for _, h := range hits {
		if int(h.Table) == i {
			of = append(of, Hit{Index: int(h.Index), Packets: uint64(h.Packets), Bytes: h.Bytes})
		}
	}
	slices.SortFunc(of, func(x, y Hit) int { return cmp.Compare(x.Index, y.Index) })
	out := of[:0]
	for _, h := range of {
		if n := len(out); n > 0 && out[n-1].Index == h.Index {
			out[n-1].Packets += h.Packets
			out[n-1].Bytes += h.Bytes
			continue
		}
		out = append(out, h)
	}
	return out
}

// run adds a run of a table in the last part of the open call; tell is whether OnRun is
// to know.
func (a *Assembler) run(d *draft, l *listed, tell bool) {
	c := &d.call
	t := d.runs.take()
	t.NFT, t.EBT = nil, nil
	t.Name, t.ID, t.Hits, t.Part = l.name, l.id, l.hits, c.part
	t.Before, t.After = &c.part.Before, nil
	t.Rules, t.Met, t.Unresolved, t.Hotdrop = nil, t.Met[:0], c.pattern.unresolved, ""
	if c.size != c.pattern.size {
		t.hits = append(t.hits[:0], l.hits...)
		for i := range t.hits {
			t.hits[i].Bytes = t.hits[i].Packets * uint64(c.size)
		}
		t.Hits = t.hits
	}
	s := d.addStep()
	s.set(&c.pattern.place, StepTable, c.time, c.cpu)
	s.Table = t
	if tell && a.OnRun != nil {
		a.OnRun(s)
	}
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
	if verdict == NFAccept && c.part.After == nil && !c.lost && !c.mayDiffer && !c.pattern.unseen {
		switch {
		case c.part.End != nil:
			c.part.After = c.part.End
		case c.nftSeen != nil && !c.part.AfterNAT:
			c.part.After = c.nftSeen
		default:
			c.part.After = &c.part.Before
		}
		if c.established {
			d.tracked(&Packet{CT: "ESTABLISHED"})
		}
	}
	if c.nftVerdict != NFAccept && c.nftVerdict != VerdictUnknown {
		// It was nf_tables that did it: xtables' tables let it pass.
		verdict = NFAccept
		c.part.Verdict = verdict
	}
	a.countRuns(d, verdict)
	steps := d.j.Steps[c.first:]
	if verdict == NFAccept {
		for i := range steps {
			steps[i].Verdict = NFAccept
		}
		return
	}
	last := len(steps) - 1
	for i := range steps {
		if steps[i].Table.Unresolved != "" && i < last {
			return
		}
	}
	// All tables but the last accepted it.
	for i := range steps {
		switch {
		case i < last:
			steps[i].Verdict = NFAccept
		case len(steps[i].Table.Hits) == 0 && steps[i].Table.Unresolved == "":
			steps[i].Verdict = NFDrop
		}
	}
}

// countRuns compares the tables of the last part with what the kernel counted.
func (a *Assembler) countRuns(d *draft, verdict int) {
	c := &d.call
	with := len(d.j.Steps) - c.first
	runs, list := c.pattern.runs, c.pattern.listed
	if runs < 0 || runs == with {
		return
	}
	c.part.Pattern = nil // of which this does not follow
	next := -1           // the table behind the last one with hits
	nat := false         // that one is before it, where a connection's first packet would have come to
	for i := len(list) - 1; i >= 0 && len(list[i].hits) == 0; i-- {
		switch {
		case !c.mayRun(list[i].name):
		case list[i].name == "nat":
			nat = true
		default:
			next, nat = i, false
		}
	}
	if verdict == NFDrop && runs == with+1 && next >= 0 {
		// A match dropped the packet before any rule of this table counted it.
		a.run(d, &list[next], true)
		if nat {
			d.j.Steps[len(d.j.Steps)-1].Table.Unresolved =
				"a match of this table or of nat dropped the packet as malformed (hotdrop)"
		}
		return
	}
	const why = "other packets ran through the tables unseen"
	if with == 0 && next >= 0 {
		a.run(d, &list[next], true)
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
	s := d.addStep()
	s.set(&c.pattern.place, StepHook, c.time, c.cpu)
	s.Verdict = verdict
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
	case j.refused:
		o.Kind, o.Step = OutDropped, i
		if table >= 0 && (said == NFQueue || said == VerdictUnknown) {
			o.Step = table
		}
	case said == NFDrop:
		o.Kind, o.Step = OutDropped, table
	case said == NFStolen:
		o.Kind, o.Step = OutStolen, table
	case said == NFQueue:
		o.Kind, o.Step = OutQueued, table
	case j.ended && s.PF == PFARP && s.Hook == 0 && said == NFAccept:
		// net/ipv4/arp.c:arp_process, which comes next, keeps no packet.
		o.Kind, o.Device = OutDelivered, s.In
	case j.ended && j.seen != nil && (s.PF == PFIPv4 || s.PF == PFIPv6) && (s.Hook == HookPreRouting || s.Hook == HookLocalOut) &&
		j.seen.fragment() && !j.behindDefrag(i):
		// It waits for the others, or waited in vain.
		o.Kind, o.Step = OutStolen, i
	}
}

// behindDefrag tells whether the packet certainly came past where fragments wait for each other
// (NF_IP_PRI_CONNTRACK_DEFRAG) in the call of a hook that ended in step i: of xtables' tables
// only raw can be before that.
func (j *Journey) behindDefrag(i int) bool {
	const defrag = -400
	for i--; i >= 0 && j.Steps[i].Kind == StepTable; i-- {
		switch t := j.Steps[i].Table; {
		case t.EBT != nil || t.Unresolved != "":
		case t.NFT == nil && t.Name != "raw":
			return true
		case t.NFT != nil && t.NFT.Type != "" && t.NFT.Priority > defrag: // else its ruleset is not known
			return true
		}
	}
	return false
}
