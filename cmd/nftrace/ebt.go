package main

import (
	"encoding/binary"
	"errors"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// ebtRulesets are the tables of ebtables that were read: each generation of each, and when
// rulesets are. To ask for a table that is not there would make it: only those that
// trace.Tracer.EBTNames or a packet has found are asked for.
type ebtRulesets struct {
	*rulesets // whose lock is held while the kernel is asked: it is one for all tables
	generations[events.TableID, *ebtRuleset]
}

// ebtRuleset is one generation of one table.
type ebtRuleset struct {
	ns    *symbolize.Namespace
	table *symbolize.EBTTable
	id    events.TableID
	texts []string
	paths map[string]*ebtPath
	err   error // why table is nil

	looksAtMark bool // a rule does
}

// ebtPath is what a run did: packets that do the same share it.
type ebtPath struct {
	rules    []events.Rule
	modifies []int // those of rules whose targets may have changed the packet
}

func (rs *ebtRuleset) size() int {
	if rs.table == nil {
		return 1
	}
	return 1 + len(rs.table.Rules)
}

func newEBTRulesets(tables *rulesets) *ebtRulesets { return &ebtRulesets{rulesets: tables} }

// prefetch does what rulesets.prefetch does.
func (r *ebtRulesets) prefetch() {
	for _, ns := range r.sys.Namespaces() {
		var names []string
		err := ns.Do(func() error {
			var err error
			names, err = r.tracer.EBTNames()
			return err
		})
		for _, name := range names {
			r.reading.Lock()
			_, rerr := r.read(ns, name)
			r.reading.Unlock()
			err = errors.Join(err, rerr)
		}
		if err != nil {
			r.say.detail("ebtables in %s: %v", nsNames([]*symbolize.Namespace{ns}), err)
		}
	}
}

// read reads a table that is there, as it is now; reading is held.
func (r *ebtRulesets) read(ns *symbolize.Namespace, name string) (*ebtRuleset, error) {
	var table *symbolize.EBTTable
	id, err := r.tracer.Lookup(func() error {
		var err error
		table, err = symbolize.ReadEBT(ns, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	if rs := r.generations.get(id); rs != nil && rs.table != nil {
		return rs, nil
	}
	rs := &ebtRuleset{ns: ns, table: table, id: id, paths: map[string]*ebtPath{}, looksAtMark: table.LooksAtMark()}
	r.generations.keep(id, rs)
	return rs, nil
}

// replaced reads a table that has replaced another.
func (r *ebtRulesets) replaced(netns uint32, name string) {
	r.reading.Lock()
	defer r.reading.Unlock()
	if ns, err := r.sys.NamespaceByInode(netns); err == nil {
		r.read(ns, name)
	}
}

// find returns what is known of the table with that ID, as rulesets.find does.
func (r *ebtRulesets) find(id events.TableID, netns uint32, name string) *ebtRuleset {
	return r.generations.find(id, &r.reading, func() (got events.TableID, rs *ebtRuleset, err error) {
		ns, err := r.sys.NamespaceByInode(netns)
		if err != nil {
			return got, nil, err
		}
		if rs, err = r.read(ns, name); err != nil {
			return got, nil, err
		}
		return rs.id, rs, nil
	}, func(err error) *ebtRuleset { return &ebtRuleset{id: id, err: err} })
}

// readTexts reads the texts of a table's rules: those that ebtables prints, unless it was
// replaced meanwhile.
func (r *ebtRulesets) readTexts(rs *ebtRuleset) {
	r.reading.Lock()
	defer r.reading.Unlock()
	same := func() bool {
		now, err := r.read(rs.ns, rs.table.Name)
		return err == nil && now.id == rs.id
	}
	err := errors.New("the table was replaced")
	if same() {
		rs.texts, err = rs.table.Texts(rs.ns, same)
	}
	if err == nil {
		return
	}
	r.say.detail("ebtables table %s: rule texts are nftrace's own: %v", rs.table.Name, err)
	rs.texts = make([]string, len(rs.table.Rules))
	for i, rule := range rs.table.Rules {
		rs.texts[i] = rule.Text()
	}
}

// seeEBT returns the ruleset of a run, and reads it while it may still be there.
func (r *resolver) seeEBT(s *events.Step) *ebtRuleset {
	return r.eb.find(s.Table.ID, s.Netns, s.Table.Name)
}

// ebtRun names the rules of a run of ebtables.
func (r *resolver) ebtRun(s *events.Step) {
	t := s.Table
	var path *ebtPath
	if t.Unresolved == "" {
		var err error
		if path, err = r.ebtPath(r.seeEBT(s), s); err != nil {
			t.Unresolved = err.Error()
		}
	}
	if t.Unresolved != "" {
		r.unresolved++
		return
	}
	t.Rules = path.rules
	meet := func(from int, pkt *events.Packet, unsure string) {
		if from < len(t.Rules) {
			t.Met = append(t.Met, events.Met{From: from, Pkt: pkt, Unsure: unsure})
		}
	}
	n := len(path.modifies)
	switch {
	case t.EBT.Behind != nil && n == 0:
		meet(0, nil, "something at the hook before this table, or a rule of it, changed it")
	case n == 0:
		meet(0, t.Before, "")
	default:
		first, last := path.modifies[0], path.modifies[n-1]
		meet(0, t.Before, "")
		if last > first {
			meet(first+1, nil, "more than one rule may have changed it")
		}
		if t.EBT.Behind != nil {
			meet(last+1, t.EBT.Behind, "")
		} else {
			meet(last+1, t.Before, "")
		}
	}
}

// ebtPath works out what a run did.
func (r *resolver) ebtPath(rs *ebtRuleset, s *events.Step) (*ebtPath, error) {
	if rs.table == nil {
		return nil, rs.err
	}
	t := s.Table
	key := append(r.key[:0], t.EBT.Hook, byte(t.EBT.Verdict))
	hits := make([]symbolize.Hit, len(t.Hits))
	for i, h := range t.Hits {
		hits[i] = symbolize.Hit(h)
		key = binary.NativeEndian.AppendUint32(key, uint32(h.Index))
		key = binary.NativeEndian.AppendUint32(key, uint32(h.Packets))
	}
	var marks *symbolize.EBTMarks
	if rs.looksAtMark && t.Before.Data != nil {
		marks = &symbolize.EBTMarks{Before: t.Before.Mark, Behind: t.Before.Mark}
		if t.EBT.Behind != nil {
			marks.Behind = t.EBT.Behind.Mark
		}
		key = binary.NativeEndian.AppendUint32(key, marks.Before)
		key = binary.NativeEndian.AppendUint32(key, marks.Behind)
	}
	r.key = key
	if p := rs.paths[string(key)]; p != nil {
		return p, nil
	}
	visits, err := rs.table.Walk(int(t.EBT.Hook), hits, t.EBT.Verdict, marks)
	if err != nil {
		return nil, err
	}
	if r.wantTexts && rs.texts == nil {
		r.eb.readTexts(rs)
	}
	p := &ebtPath{}
	for i := range visits {
		v := &visits[i]
		line := ebtLine(v, t.EBT.Hook)
		if v.Rule != nil {
			if r.wantTexts {
				line.Text = rs.texts[v.Rule.Index]
			}
			if v.Rule.Modifies() {
				p.modifies = append(p.modifies, len(p.rules))
			}
		}
		line.TracePrefix = render.TracePrefix(s, &line)
		p.rules = append(p.rules, line)
	}
	r.roomForPath()
	rs.paths[string(key)] = p
	return p, nil
}

// ebtLine is a visit as it is shown.
func ebtLine(v *symbolize.EBTVisit, hook uint8) events.Rule {
	line := events.Rule{Chain: v.Chain.Name, Type: events.TypeRule, Depth: v.Depth}
	switch {
	case v.Rule != nil && v.Rule.Dest != nil:
		line.Action = "jump " + v.Rule.Dest.Name
	case v.Verdict == symbolize.EBTContinue:
		line.Action = "continue"
	default:
		line.Action = v.Verdict.String()
	}
	if v.Rule != nil {
		line.Num = v.Rule.Num
		if v.Verdict == symbolize.EBTReturn && v.Rule.Always {
			line.Type = events.TypeReturn
		}
	} else {
		line.Num = len(v.Chain.Rules) + 1
		line.Type, line.IsPolicy = events.TypePolicy, true
		if v.Verdict == symbolize.EBTReturn {
			line.Type, line.IsPolicy, line.IsEnd = events.TypeReturn, false, true
		}
	}
	if hook == symbolize.EBTBrouting && v.Verdict == symbolize.EBTDrop {
		line.Action = "DROP (route it)"
	}
	return line
}
