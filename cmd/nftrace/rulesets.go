package main

import (
	"sync"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

// rulesets are the legacy tables that were read: each generation of each, for packets are
// told by the rules that they met. They are read at the start, when a packet meets one that
// is not known, and, beside everything else, whenever one is replaced (session.readTables).
type rulesets struct {
	sys    *symbolize.System
	tracer *trace.Tracer
	say    *speaker

	reading sync.Mutex // held until what was read is kept
	generations[events.TableID, *ruleset]
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

func newRulesets(sys *symbolize.System, tracer *trace.Tracer, say *speaker) *rulesets {
	return &rulesets{sys: sys, tracer: tracer, say: say}
}

var families = []symbolize.Family{symbolize.IPv4, symbolize.IPv6, symbolize.ARP}

func family(pf uint8) symbolize.Family {
	switch pf {
	case events.PFIPv6:
		return symbolize.IPv6
	case events.PFARP:
		return symbolize.ARP
	}
	return symbolize.IPv4
}

func (r *rulesets) keep(rs *ruleset) { r.generations.keep(rs.id, rs) }

// size is what a ruleset counts for in generations.total: its entries.
func (rs *ruleset) size() int {
	if rs.table == nil {
		return 1
	}
	return 1 + len(rs.table.Entries)
}

// prefetch reads all tables of all namespaces, so that a table that is replaced
// right after a packet passed it is known. Texts are not read.
func (r *rulesets) prefetch() {
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
func (r *rulesets) read(ns *symbolize.Namespace, family symbolize.Family, name string) (*ruleset, error) {
	r.reading.Lock()
	defer r.reading.Unlock()
	return r.readLocked(ns, family, name)
}

func (r *rulesets) readLocked(ns *symbolize.Namespace, family symbolize.Family, name string) (*ruleset, error) {
	id, snap, err := r.snapshot(ns, family, name, false)
	if err != nil {
		return nil, err
	}
	if rs := r.get(id); rs != nil && rs.table != nil {
		return rs, nil
	}
	rs := &ruleset{ns: ns, family: family, table: snap.Table, id: id}
	r.keep(rs)
	return rs, nil
}

// snapshot reads a table, and tells which generation of it that is. Only one may be read at
// a time: reading is held.
func (r *rulesets) snapshot(ns *symbolize.Namespace, family symbolize.Family, name string, texts bool) (events.TableID, *symbolize.Snapshot, error) {
	var snap *symbolize.Snapshot
	id, err := r.tracer.Lookup(func() error {
		var err error
		snap, err = symbolize.ReadSnapshot(ns, family, name, texts)
		return err
	})
	return id, snap, err
}

// find returns what is known of the table with that ID, and reads it while it may still be
// there. Without one, what it returns says why nobody can know it.
func (r *rulesets) find(id events.TableID, netns uint32, family symbolize.Family, name string) *ruleset {
	return r.generations.find(id, &r.reading, func() (got events.TableID, rs *ruleset, err error) {
		ns, err := r.sys.NamespaceByInode(netns)
		if err != nil {
			return got, nil, err
		}
		if rs, err = r.readLocked(ns, family, name); err != nil {
			return got, nil, err
		}
		return rs.id, rs, nil
	}, func(err error) *ruleset { return &ruleset{id: id, err: err} })
}

// texts returns the texts of a table's entries: those that iptables-save prints, unless the
// table was replaced meanwhile.
func (r *rulesets) texts(rs *ruleset) []string {
	r.reading.Lock()
	defer r.reading.Unlock()
	id, snap, err := r.snapshot(rs.ns, rs.family, rs.table.Name, true)
	if err == nil && id == rs.id {
		if snap.Native != "" {
			r.say.detail("%v table %s: rule texts are nftrace's own: %s", rs.family, rs.table.Name, snap.Native)
		}
		return snap.Texts
	}
	// Its rules are known, their texts are rendered here.
	texts := make([]string, len(rs.table.Entries))
	for i := range texts {
		texts[i] = rs.table.RuleText(i)
	}
	return texts
}
