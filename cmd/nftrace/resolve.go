package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// resolver gives the steps of journeys their names: rules from counters, namespaces
// from inode numbers.
type resolver struct {
	sys *symbolize.System
	// wantTexts is whether rules are printed with their texts: reading those means to
	// run iptables-save.
	wantTexts bool

	tables     *rulesets
	nft        *nftRulesets
	eb         *ebtRulesets
	recent     [256]*ruleset     // some of tables, for most packets meet the same few
	names      map[uint32]string // of namespaces, by inode
	unresolved uint64
	paths      int    // that were kept since all were forgotten
	key        []byte // where keys of pathCache are made
	runs       []tableRun
}

// tableRun is a run of a table with what became known of it.
type tableRun struct {
	step  *events.Step
	table *symbolize.Table // nil: not known
	path  *knownPath       // nil: unresolved
}

func newResolver(sys *symbolize.System, tables *rulesets, nft *nftRulesets, eb *ebtRulesets, wantTexts bool) *resolver {
	return &resolver{sys: sys, tables: tables, nft: nft, eb: eb, wantTexts: wantTexts, names: map[uint32]string{}}
}

// see returns the ruleset of a step's table, and reads it while it may still be there. It
// is nil if nobody can know it.
func (r *resolver) see(s *events.Step) *ruleset {
	id := s.Table.ID
	// Generations are times in nanoseconds.
	recent := &r.recent[id.Gen%uint64(len(r.recent))]
	if rs := *recent; rs != nil && rs.id == id {
		return rs
	}
	if id.Gen == 0 {
		return r.tables.get(id)
	}
	*recent = r.tables.find(id, s.Netns, family(s.PF), s.Table.Name)
	return *recent
}

// text is the text of an entry's rule, "" if nobody is going to see it.
func (r *resolver) text(rs *ruleset, entry int) string {
	if !r.wantTexts {
		return ""
	}
	if rs.texts == nil {
		rs.texts = r.tables.texts(rs)
	}
	return rs.texts[entry]
}

// journey fills in all names of a journey.
func (r *resolver) journey(j *events.Journey) {
	conclude := false
	netns, name := uint32(0), ""
	steps := j.Steps
	for i := 0; i < len(steps); {
		s := &steps[i]
		if s.Netns != netns {
			netns, name = s.Netns, r.netns(s.Netns)
		}
		s.NetnsName = name
		i++
		if s.SentOn() {
			r.unresolved++
		}
		if s.Table == nil {
			continue
		}
		first, part := i-1, s.Table.Part
		for i < len(steps) && steps[i].Table != nil && steps[i].Table.Part == part {
			steps[i].NetnsName = name
			i++
		}
		conclude = r.tablesOf(part, steps[first:i]) || conclude
	}
	if conclude {
		j.Conclude()
	}
	o := &j.Outcome
	if o.Step >= 0 {
		s := &j.Steps[o.Step]
		o.NetnsName = s.NetnsName
		if t := s.Table; t != nil && o.Kind != events.OutSent && t.Hotdrop == "" {
			o.Rule = len(t.Rules) - 1
		}
	} else if n := len(j.Steps); n > 0 {
		o.NetnsName = j.Steps[n-1].NetnsName
	}
}

// tablesOf resolves the tables of a part of a hook's call, those of nf_tables and ebtables
// first. It tells whether the journey's outcome may be another than it seemed.
func (r *resolver) tablesOf(part *events.Part, steps []events.Step) bool {
	n := 0
	for ; n < len(steps) && (steps[n].Table.NFT != nil || steps[n].Table.EBT != nil); n++ {
		if steps[n].Table.EBT != nil {
			r.ebtRun(&steps[n])
		} else {
			r.nftRun(&steps[n])
		}
	}
	if n == len(steps) {
		return true // they were told in their order
	}
	r.part(part, steps[:n], steps[n:])
	if part.Changed {
		behindNFT(steps, n)
	}
	if n == 0 {
		return part.Verdict != events.NFAccept
	}
	copy(steps, inOrder(steps, n))
	return true
}

func (r *resolver) netns(inum uint32) string {
	if inum == 0 {
		return ""
	}
	name, ok := r.names[inum]
	if !ok {
		name = r.sys.NetnsName(inum)
		r.names[inum] = name
	}
	return name
}

// part resolves the runs of xtables' tables in one part of a hook's call; others are those of
// nf_tables and ebtables there.
func (r *resolver) part(part *events.Part, others, steps []events.Step) {
	pattern := part.Pattern
	if pattern == nil {
		r.work(steps)
		packetsOf(r.runs, others)
		return
	}
	all, _ := pattern.Known.(*knownParts)
	if all == nil {
		all = &knownParts{}
		pattern.Known = all
	}
	known := all.find(part)
	switch {
	case known == nil:
		r.work(steps)
		packetsOf(r.runs, others)
		all.keep(part, r.runs)
	case known.modifies || part.Before.Data == nil || part.End != nil:
		r.runs = known.again(r.runs[:0], steps)
		packetsOf(r.runs, others)
	default:
		known.unmodified(part, steps)
	}
}

// work works out the runs of a part.
func (r *resolver) work(steps []events.Step) {
	r.runs = r.runs[:0]
	// The packet's addresses are those that it came with.
	plain := !steps[0].Table.Part.Changed
	for i := range steps {
		s := &steps[i]
		rs := r.see(s)
		run := tableRun{step: s}
		if rs != nil {
			run.table = rs.table
		}
		if s.Table.Unresolved == "" {
			run.path = r.path(s, rs, plain)
			plain = plain && run.leavesAddrs()
		} else {
			plain = false
		}
		if s.Table.Unresolved != "" {
			r.unresolved++
		}
		r.runs = append(r.runs, run)
	}
}

// leavesAddrs tells whether the packet's addresses are behind the table what they were.
func (r *tableRun) leavesAddrs() bool {
	if r.path != nil {
		return r.path.plain
	}
	return leavesAddrs(r.table, r.step.Table.Hits)
}

// leavesAddrs tells whether the packet's addresses stay as they are within the table.
func leavesAddrs(table *symbolize.Table, hits []events.Hit) bool {
	if table == nil {
		return false
	}
	for _, h := range hits {
		if h.Index < len(table.Entries) {
			switch table.Entries[h.Index].Target {
			case "SNPT", "DNPT", "mangle":
				return false
			}
		}
	}
	return true
}

// path resolves one run; it is nil where it cannot. plain tells whether the packet's
// addresses are known when it comes to the table.
func (r *resolver) path(s *events.Step, rs *ruleset, plain bool) *knownPath {
	t := s.Table
	if rs == nil || rs.table == nil {
		t.Unresolved = "the ruleset was replaced before it could be read"
		if rs != nil && rs.err != nil {
			t.Unresolved = rs.err.Error()
		}
		return nil
	}
	r.key = pathKey(r.key[:0], s, plain)
	known := rs.paths.get(s.Hook, r.key)
	if known == nil || !bytesFit(s) {
		same := leavesAddrs(rs.table, t.Hits)
		path, verdict, looked, err := walk(rs.table, s, plain && same)
		if errors.Is(err, symbolize.ErrAmbiguous) && plain {
			if p, v, ok := followARP(rs.table, s); ok {
				path, verdict, looked, err = p, v, true, nil
			}
		}
		if err != nil {
			t.Unresolved = err.Error()
			s.Verdict = verdict
			return nil
		}
		known = r.known(rs, s, path, verdict)
		known.plain, known.looked = same, looked
		r.roomForPath()
		rs.paths.put(r.key, known)
	}
	known.taken(s)
	return known
}

// walk finds the only path that explains the run's hits, and the table's verdict. With
// an error the verdict is what is known of it. plain tells whether rules can be held
// against the packet's addresses; looked, whether any was.
func walk(table *symbolize.Table, s *events.Step, plain bool) (path *symbolize.Path, verdict int, looked bool, err error) {
	t := s.Table
	if !bytesFit(s) {
		return nil, s.Verdict, false, errors.New("byte and packet counters do not fit one packet")
	}
	for _, h := range t.Hits {
		if h.Index >= len(table.Entries) {
			return nil, s.Verdict, false, fmt.Errorf("the table has %d entries, the counters more", len(table.Entries))
		}
	}
	in := hitsOf(t)
	var accept func(int) bool
	if plain {
		if info, ok := packetInfo(s); ok {
			accept = func(i int) bool {
				looked = looked || table.LooksAtPacket(i)
				return table.Plausible(i, info)
			}
		}
	}
	var hotdrop *symbolize.Path
	var cause error
	for _, verdict := range verdicts(s) {
		path, err := table.Walk(int(s.Hook), in, verdict, accept)
		switch {
		case errors.Is(err, symbolize.ErrAmbiguous):
			return nil, verdict, looked, err
		case err != nil:
			if cause == nil {
				cause = err
			}
		case path.Hotdrop != "":
			// Only if no rule gave another verdict.
			hotdrop = path
		default:
			return path, verdictOf(table, path, s, verdict), looked, nil
		}
	}
	if hotdrop != nil {
		return hotdrop, events.NFDrop, looked, nil
	}
	return nil, s.Verdict, looked, cause
}

func hitsOf(t *events.TableRun) []symbolize.Hit {
	out := make([]symbolize.Hit, len(t.Hits))
	for i, h := range t.Hits {
		out[i] = symbolize.Hit{Index: h.Index, Packets: h.Packets, Bytes: h.Bytes}
	}
	return out
}

// followARP finds a path that walk cannot tell from others: that of a packet of ARP which is known
// as it came to the table.
func followARP(table *symbolize.Table, s *events.Step) (path *symbolize.Path, verdict int, ok bool) {
	info, ok := packetInfo(s)
	if s.PF != events.PFARP || !ok {
		return nil, 0, false
	}
	path, verdict, err := table.FollowARP(int(s.Hook), hitsOf(s.Table), info)
	return path, verdict, err == nil && slices.Contains(verdicts(s), verdict)
}

// verdicts are those that the table can have returned, as far as the packet's next
// steps tell, the likeliest first: a target that ends a run fits them all.
func verdicts(s *events.Step) []int {
	switch {
	case s.Verdict == events.NFAccept:
		// It may have come back from userspace.
		return []int{events.NFAccept, events.NFQueue}
	case s.Verdict != events.VerdictUnknown:
		return []int{s.Verdict}
	case s.Table.Part.Verdict == events.NFDrop:
		// The table, or conntrack, NAT or another module behind it.
		return []int{events.NFDrop, events.NFAccept}
	}
	return []int{events.NFAccept, events.NFStolen, events.NFQueue, events.NFDrop}
}

// verdictOf is the verdict of a run whose path fits verdict: there are targets that
// always return the same one.
func verdictOf(table *symbolize.Table, path *symbolize.Path, s *events.Step, verdict int) int {
	if len(path.Visits) == 0 {
		return verdict
	}
	e := &table.Entries[path.Visits[len(path.Visits)-1].Index]
	if e.Kind != symbolize.TargetExtension {
		return verdict
	}
	switch {
	case e.Target == "NFQUEUE":
		return events.NFQueue
	case e.Target == "REJECT":
		return events.NFDrop
	case e.Target == "SYNPROXY" && s.Verdict == events.VerdictUnknown && s.Table.Part.Verdict != events.NFDrop:
		return events.NFStolen
	}
	return verdict
}

// bytesFit reports that the byte counters grew by this packet and no other.
func bytesFit(s *events.Step) bool {
	t := s.Table
	before, after := &t.Part.Before, t.Part.After
	if after == nil || before.Len != after.Len {
		return true // targets may have made it longer
	}
	size := before.Len
	if s.PF == events.PFARP {
		if arpOf(before) == nil {
			return true
		}
		size = symbolize.ARPLen // arp_tables.c: arp_hdr_len
	}
	for i := range t.Hits {
		if t.Hits[i].Bytes != t.Hits[i].Packets*uint64(size) {
			return false
		}
	}
	return true
}

// arpOf is the ARP packet that p is, if it is one with the addresses of Ethernet; else nil.
func arpOf(p *events.Packet) []byte {
	if p.EtherType != etherARP || p.MACDevType != arphrdEther || len(p.Data) < symbolize.ARPLen {
		return nil
	}
	return p.Data[:symbolize.ARPLen]
}

const (
	etherARP    = 0x0806 // ETH_P_ARP
	arphrdEther = 1      // ARPHRD_ETHER
)

// packetInfo is what the rules' own conditions look at.
func packetInfo(s *events.Step) (symbolize.PacketInfo, bool) {
	p := packetAt(s)
	if s.PF == events.PFARP {
		arp := arpOf(p)
		if arp == nil {
			return symbolize.PacketInfo{}, false
		}
		return symbolize.PacketInfo{ARP: (*[symbolize.ARPLen]byte)(arp), In: s.In.Name, Out: s.Out.Name}, true
	}
	tuple, frag := p.Tuple()
	if !tuple.Src.Addr().IsValid() {
		return symbolize.PacketInfo{}, false
	}
	proto := int(tuple.Proto)
	if s.PF == events.PFIPv6 && !frag {
		switch proto {
		case 0, 43, 44, 51, 60: // extension headers that are cut off, by the capture or in the packet
			proto = -1
		}
	}
	return symbolize.PacketInfo{
		Src: tuple.Src.Addr(), Dst: tuple.Dst.Addr(), Proto: proto,
		In: s.In.Name, Out: s.Out.Name, Frag: frag,
	}, true
}

// packetAt is the packet that rules are held against.
func packetAt(s *events.Step) *events.Packet {
	if behindUnseenNAT(s) {
		return s.Table.Part.After
	}
	return &s.Table.Part.Before
}

// behindUnseenNAT reports that the table met the packet with another destination than its part
// began with.
func behindUnseenNAT(s *events.Step) bool {
	t := s.Table
	return t.Part.NATUnseen && (t.Name == "filter" || t.Name == "security")
}

// marksOnly tells whether a part's tables did nothing with the packet but set its mark, and that
// comes to the mark that it had at the part's end.
func marksOnly(runs []tableRun, end uint32) bool {
	mark := runs[0].step.Table.Part.Before.Mark
	for i := range runs {
		run := &runs[i]
		if run.path == nil {
			if run.opaque() {
				return false
			}
			continue
		}
		for k := range run.path.Visits {
			e := run.entry(k)
			if !e.Modifies() {
				continue
			}
			if e.Target != "MARK" {
				return false
			}
			var ok bool
			if mark, _, ok = run.table.Apply(e.Index, mark, nil); !ok {
				return false
			}
		}
	}
	return mark == end
}

// packetsOf tells, for each rule of a part's tables, the packet as it was when the rule
// matched. Targets such as MARK and TTL change it on the way. others are runs of nf_tables and
// ebtables there.
func packetsOf(runs []tableRun, others []events.Step) {
	part := runs[0].step.Table.Part
	changers, restores := 0, false
	for i := range runs {
		switch run := &runs[i]; {
		case run.path != nil && run.path.modifies:
			for k := range run.path.Visits {
				if e := run.entry(k); e.Modifies() {
					changers++
					restores = restores || e.RestoresMark()
				}
			}
		case run.opaque():
			changers++
		}
	}
	c := chain{part: part, now: &part.Before, changers: changers, lost: part.Changed}
	if part.AfterNAT {
		c.end = &part.Before
		if part.End != nil {
			c.end = part.End
		}
	}
	switch {
	case part.Before.Data == nil:
		c.unsure = "it was not seen between NAT and its end"
		c.changers = -1
	case part.AfterNAT && part.Changed:
		c.unsure = changedByNFT
		c.changers = -1
	case part.AfterNAT && (changers > 0 || part.End != nil):
		// All but the mark was seen behind the part only. nf_tables may have set the mark, too.
		if part.MarkKnown && len(others) == 0 && marksOnly(runs, c.end.Mark) {
			c.end = nil
			break
		}
		c.unsure = "it was seen only behind the rules that may have changed it"
	}
	if restores {
		c.restored = restoredMarks(runs, others)
	}
	for i := range runs {
		c.table(&runs[i])
	}
}

func (r *tableRun) entry(visit int) *symbolize.Entry {
	return &r.table.Entries[r.path.Visits[visit].Index]
}

// opaque reports that it is not known what the table made of the packet.
func (r *tableRun) opaque() bool {
	if r.path != nil {
		return false
	}
	hits := r.step.Table.Hits
	if r.table == nil || len(hits) == 0 {
		return true
	}
	for _, h := range hits {
		if h.Index >= len(r.table.Entries) || r.table.Entries[h.Index].Modifies() {
			return true
		}
	}
	return false
}

// chain carries a packet through the tables of a part.
type chain struct {
	part *events.Part
	// now is the packet; where unsure says why it is not known, it is so but for
	// what is not known.
	now    *events.Packet
	unsure string
	// lost is set where even the TTL is not known any more.
	lost bool
	// natted is set where NAT made of the packet what nobody saw.
	natted bool
	// end is the packet at the part's end, where it is known behind the last change only.
	end      *events.Packet
	changers int // visits, and tables that are not known, still to come that may change it
	restored []restored
}

func (c *chain) table(run *tableRun) {
	t := run.step.Table
	if c.unsure == "" && (c.natted || behindUnseenNAT(run.step)) {
		if next := behind(c.now, c.part.After); next != nil && c.changers == 0 {
			c.now = next
		} else {
			c.unsure = "the kernel skipped the probe of NAT"
		}
	}
	// Conntrack comes to know the packet between tables.
	t.SetBefore(c.now, t.Before.CT, t.Before.CTReply)
	c.now = t.Before
	switch {
	case run.path == nil:
		if run.opaque() {
			c.lost = true
			c.change("table "+t.Name, 0, nil, false)
		}
	case run.path.modifies:
		for i := range t.Rules {
			c.meet(t, i)
			switch e := run.entry(i); {
			case e.RestoresMark():
				r := c.restored[0]
				c.restored = c.restored[1:]
				c.change(e.Target, r.mark, c.now.Data, r.ok)
			case e.Modifies():
				mark, data, ok := run.table.Apply(e.Index, c.now.Mark, c.now.Data)
				if e.GivesSocket() {
					c.own()
				}
				c.change(e.Target, mark, data, ok)
			}
		}
	case len(t.Rules) > 0:
		c.meet(t, 0)
	}
	if c.unsure == "" && run.step.Verdict == events.NFAccept && run.path != nil {
		t.After = c.now
	}
	c.natted = c.part.Unseen && !c.part.AfterNAT && run.givesDst()
}

// givesDst reports that NAT gave the packet a destination behind the run, which is of OUTPUT.
func (r *tableRun) givesDst() bool {
	if r.path == nil || len(r.path.Visits) == 0 || r.step.Hook != events.HookLocalOut {
		return false
	}
	switch r.entry(len(r.path.Visits) - 1).Target {
	case "DNAT", "REDIRECT", "NETMAP":
		return true
	}
	return false
}

// meet notes that the rules from one on meet the packet as it is now.
func (c *chain) meet(t *events.TableRun, from int) {
	met := events.Met{From: from, Pkt: c.now}
	if c.unsure != "" {
		met.Pkt, met.Unsure = nil, c.unsure
	}
	if n := len(t.Met); n > 0 && t.Met[n-1].Pkt == met.Pkt && t.Met[n-1].Unsure == met.Unsure {
		return
	}
	t.Met = append(t.Met, met)
}

// own gives the packet the owner that it had when it was next seen.
func (c *chain) own() {
	after := c.part.After
	if after == nil || after == &c.part.Before {
		c.unsure, c.lost = "who owns the socket that TPROXY gave it is not known", true
		return
	}
	next := *c.now
	next.HasOwner, next.UID, next.GID = after.HasOwner, after.UID, after.GID
	c.now = &next
}

// change is what somebody makes of the packet; ok is clear where that is not known.
func (c *chain) change(who string, mark uint32, data []byte, ok bool) {
	c.changers--
	switch {
	case c.end != nil:
		if c.changers == 0 {
			c.now, c.unsure = c.end, ""
		}
		return
	case !ok && c.unsure == "":
		c.unsure = "what " + who + " made of the packet is not known"
	case ok && (mark != c.now.Mark || !bytes.Equal(data, c.now.Data)):
		next := *c.now
		next.Mark, next.Data = mark, data
		c.now = &next
	}
	if c.unsure != "" && c.changers == 0 && !c.lost && !c.part.NATUnseen {
		if next := behind(c.now, c.part.After); next != nil {
			c.now, c.unsure = next, ""
		}
	}
}

// behind is the packet p behind the last target that changed it, from how it was when
// it was next seen; nil if it was not, or was another packet by then (a fragment, in a
// tunnel).
// Routing, which comes between, changes devices and the TTL (hop limit): those are p's.
func behind(p, after *events.Packet) *events.Packet {
	if after == nil {
		return nil
	}
	a, b := after.Data, p.Data
	hops, same := 0, false
	switch p.Family {
	case events.PFIPv4:
		hops = 8
		same = len(a) >= 20 && len(b) >= 20 && a[9] == b[9] && a[6]&0x3f == b[6]&0x3f && a[7] == b[7]
	case events.PFIPv6:
		hops = 7
		same = len(a) >= 40 && len(b) >= 40 && a[6] == b[6]
	}
	if !same || p.Family != after.Family {
		return nil
	}
	next := *p
	next.Len, next.Mark, next.Data = after.Len, after.Mark, a
	if a[hops] != b[hops] {
		next.Data = bytes.Clone(a)
		next.Data[hops] = b[hops]
		if n := int(a[0]&15) * 4; p.Family == events.PFIPv4 && n >= 20 && n <= len(a) {
			setChecksum(next.Data[:n])
		}
	}
	return &next
}

// setChecksum makes an IPv4 header's checksum right.
func setChecksum(h []byte) {
	h[10], h[11] = 0, 0
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}
