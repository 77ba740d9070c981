package main

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

// resolver gives the steps of journeys their names: rules from counters, namespaces
// from inode numbers.
type resolver struct {
	sys    *symbolize.System
	tracer *trace.Tracer
	say    *speaker
	// wantTexts is whether rules are printed with their texts: reading those means to
	// run iptables-save.
	wantTexts bool

	tables     map[events.TableID]*ruleset
	recent     [16]*ruleset      // some of tables, for most packets meet the same few
	names      map[uint32]string // of namespaces, by inode
	unresolved uint64
	shared     *sharedRuns
	key        []byte // where keys of pathCache are made
}

// ruleset is one generation of one table. Its texts are read when they are first
// wanted.
type ruleset struct {
	ns     *symbolize.Namespace
	family symbolize.Family
	table  *symbolize.Table
	id     events.TableID
	texts  []string
	paths  pathCache
	err    error // why table is nil
}

func newResolver(sys *symbolize.System, tracer *trace.Tracer, say *speaker, wantTexts bool) *resolver {
	return &resolver{
		sys: sys, tracer: tracer, say: say, wantTexts: wantTexts,
		tables: map[events.TableID]*ruleset{},
		names:  map[uint32]string{},
		shared: newSharedRuns(),
	}
}

var families = []symbolize.Family{symbolize.IPv4, symbolize.IPv6}

// prefetch reads all tables of all namespaces, so that a table that is replaced
// right after a packet passed it is known. Texts are not read.
func (r *resolver) prefetch() {
	for _, ns := range r.sys.Namespaces() {
		for _, family := range families {
			for _, name := range tableNames(ns, family) {
				if _, err := r.read(ns, family, name); err != nil {
					r.say.detail("%v table %s in %s: %v", family, name, nsNames([]*symbolize.Namespace{ns}), err)
				}
			}
		}
	}
}

func tableNames(ns *symbolize.Namespace, family symbolize.Family) []string {
	var names []string
	err := ns.Do(func() error {
		var err error
		names, err = symbolize.TableNames(family)
		return err
	})
	if err != nil {
		return nil // the namespace went away
	}
	return names
}

// read reads a table as it is now.
func (r *resolver) read(ns *symbolize.Namespace, family symbolize.Family, name string) (*ruleset, error) {
	var snap *symbolize.Snapshot
	id, err := r.tracer.Lookup(func() error {
		var err error
		snap, err = symbolize.ReadSnapshot(ns, family, name, false)
		return err
	})
	if err != nil {
		return nil, err
	}
	if rs := r.tables[id]; rs != nil && rs.table != nil {
		return rs, nil
	}
	rs := &ruleset{ns: ns, family: family, table: snap.Table, id: id}
	r.keep(rs)
	return rs, nil
}

// ruleset is what is known of a table, nil if nothing is.
func (r *resolver) ruleset(id events.TableID) *ruleset {
	recent := r.recentAt(id)
	if rs := *recent; rs != nil && rs.id == id {
		return rs
	}
	rs := r.tables[id]
	if rs != nil {
		*recent = rs
	}
	return rs
}

func (r *resolver) keep(rs *ruleset) {
	r.tables[rs.id] = rs
	*r.recentAt(rs.id) = rs
}

// recentAt is where a ruleset is kept until another takes its place. Those of tables
// differ in the page of their address.
func (r *resolver) recentAt(id events.TableID) **ruleset {
	return &r.recent[(id.Private>>12^id.Private>>6^id.Gen)%uint64(len(r.recent))]
}

// see returns the ruleset of a step's table, and reads it while it may still be there. It
// is nil if nobody can know it.
func (r *resolver) see(s *events.Step) *ruleset {
	id := s.Table.ID
	if rs := r.ruleset(id); rs != nil || id.Gen == 0 {
		return rs
	}
	rs := &ruleset{id: id, err: errors.New("the ruleset was replaced before it could be read")}
	ns, err := r.sys.NamespaceByInode(s.Netns)
	if err != nil {
		rs.err = fmt.Errorf("the ruleset could not be read: %w", err)
	} else if got, err := r.read(ns, family(s.PF), s.Table.Name); err != nil {
		rs.err = fmt.Errorf("the ruleset could not be read: %w", err)
	} else if got.id == id {
		return got
	}
	r.keep(rs)
	return rs
}

func family(pf uint8) symbolize.Family {
	if pf == events.PFIPv6 {
		return symbolize.IPv6
	}
	return symbolize.IPv4
}

// text is the text of an entry's rule, "" if nobody is going to see it.
func (r *resolver) text(rs *ruleset, entry int) string {
	if !r.wantTexts {
		return ""
	}
	if rs.texts == nil {
		rs.texts = r.readTexts(rs)
	}
	return rs.texts[entry]
}

func (r *resolver) readTexts(rs *ruleset) []string {
	var snap *symbolize.Snapshot
	id, err := r.tracer.Lookup(func() error {
		var err error
		snap, err = symbolize.ReadSnapshot(rs.ns, rs.family, rs.table.Name, true)
		return err
	})
	if err == nil && id == rs.id {
		if snap.Native != "" {
			r.say.detail("%v table %s: rule texts are nftrace's own: %s", rs.family, rs.table.Name, snap.Native)
		}
		return snap.Texts
	}
	// Replaced meanwhile: its rules are known, their texts are rendered here.
	texts := make([]string, len(rs.table.Entries))
	for i := range texts {
		texts[i] = rs.table.RuleText(i)
	}
	return texts
}

// journey fills in all names of a journey.
func (r *resolver) journey(j *events.Journey) {
	netns, name := uint32(0), ""
	for i := range j.Steps {
		s := &j.Steps[i]
		if s.Netns != netns {
			netns, name = s.Netns, r.netns(s.Netns)
		}
		s.NetnsName = name
		if s.Kind != events.StepTable {
			continue
		}
		rs := r.see(s)
		if s.Table.Unresolved == "" {
			r.table(s, rs)
		}
		if s.Table.Unresolved != "" {
			r.unresolved++
		}
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

// table resolves one run.
func (r *resolver) table(s *events.Step, rs *ruleset) {
	t := s.Table
	if rs == nil || rs.table == nil {
		t.Unresolved = "the ruleset was replaced before it could be read"
		if rs != nil && rs.err != nil {
			t.Unresolved = rs.err.Error()
		}
		return
	}
	r.key = pathKey(r.key[:0], s)
	known := rs.paths.get(s.Hook, r.key)
	if known == nil || !bytesFit(s, t.Hits) {
		path, err := walk(rs.table, s, t.Hits)
		shared := false
		if err != nil && t.Shared {
			if hits := r.shared.solve(rs.table, s); hits != nil {
				path, err = walk(rs.table, s, hits)
				shared = true
			}
		}
		if err != nil {
			t.Unresolved = err.Error()
			return
		}
		known = r.known(rs, s, path)
		if !shared {
			rs.paths.put(r.key, known)
		}
	}
	t.Hotdrop = known.Hotdrop
	t.Rules = append(t.Rules[:0], known.rules...)
	if known.modifies {
		packetsOf(rs.table, known.Visits, t)
		return
	}
	for i := range t.Rules {
		t.Rules[i].Pkt = &t.Before
	}
}

// walk finds the only path that explains the hits.
func walk(table *symbolize.Table, s *events.Step, hits []events.Hit) (*symbolize.Path, error) {
	if !bytesFit(s, hits) {
		return nil, errors.New("byte and packet counters do not fit one packet")
	}
	in := make([]symbolize.Hit, len(hits))
	plain := true // the packet's addresses stay as they are within the table
	for i, h := range hits {
		if h.Index >= len(table.Entries) {
			return nil, fmt.Errorf("the table has %d entries, the counters more", len(table.Entries))
		}
		in[i] = symbolize.Hit{Index: h.Index, Packets: h.Packets, Bytes: h.Bytes}
		switch table.Entries[h.Index].Target {
		case "SNPT", "DNPT":
			plain = false
		}
	}
	var accept func(int) bool
	if info, ok := packetInfo(s); ok && plain {
		accept = func(i int) bool { return table.Plausible(i, info) }
	}
	return table.Walk(int(s.Hook), in, s.Verdict, accept)
}

// bytesFit reports that the byte counters grew by this packet and no other.
func bytesFit(s *events.Step, hits []events.Hit) bool {
	if s.Table.Before.Len != s.Table.After.Len {
		return true
	}
	for i := range hits {
		if hits[i].Bytes != hits[i].Packets*uint64(s.Table.Before.Len) {
			return false
		}
	}
	return true
}

// packetInfo is what the rules' own conditions look at.
func packetInfo(s *events.Step) (symbolize.PacketInfo, bool) {
	p := &s.Table.Before
	tuple, frag := p.Tuple()
	if !tuple.Src.Addr().IsValid() {
		return symbolize.PacketInfo{}, false
	}
	return symbolize.PacketInfo{
		Src: tuple.Src.Addr(), Dst: tuple.Dst.Addr(), Proto: int(tuple.Proto),
		In: s.In.Name, Out: s.Out.Name, Frag: frag,
	}, true
}

// packetsOf tells, for each rule, the packet as it was when the rule matched. Targets
// such as MARK and TTL change it on the way.
func packetsOf(table *symbolize.Table, visits []symbolize.Visit, t *events.TableRun) {
	changers := 0
	for i := range visits {
		if table.Entries[visits[i].Index].Modifies() {
			changers++
		}
	}
	now, unsure := &t.Before, ""
	for i := range visits {
		if unsure == "" {
			t.Rules[i].Pkt = now
		} else {
			t.Rules[i].PktUnsure = unsure
		}
		e := &table.Entries[visits[i].Index]
		if !e.Modifies() {
			continue
		}
		changers--
		switch {
		case changers == 0 && t.After.Data != nil:
			now, unsure = &t.After, ""
		case unsure == "":
			mark, data, ok := table.Apply(e.Index, now.Mark, now.Data)
			if !ok {
				unsure = "what " + e.Target + " made of the packet is not known"
				continue
			}
			if mark != now.Mark || !bytes.Equal(data, now.Data) {
				next := *now
				next.Mark, next.Data = mark, data
				now = &next
			}
		}
	}
}
