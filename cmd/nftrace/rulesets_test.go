package main

import (
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// The oldest rulesets are forgotten when there is too much of them, the newest few never.
func TestRulesetsAreBounded(t *testing.T) {
	id := func(n int) events.TableID { return events.TableID{Private: 4096, Gen: uint64(n)} }
	for name, c := range map[string]struct {
		entries, kept int
	}{
		"small": {entries: maxKept/1000 - 1, kept: 1000},
		"large": {entries: maxKept, kept: leastKept},
	} {
		r := newRulesets(nil, nil, nil)
		table := &symbolize.Table{Entries: make([]symbolize.Entry, c.entries)}
		const all = 1013
		for n := range all {
			r.keep(&ruleset{id: id(n), table: table})
			if n%7 == 0 {
				r.keep(&ruleset{id: id(n), table: table}) // again
			}
		}
		if len(r.known) != c.kept || len(r.order) != c.kept || r.total != c.kept*(c.entries+1) {
			t.Errorf("%s: %d known, %d in order, %d entries; want %d rulesets", name, len(r.known), len(r.order), r.total, c.kept)
		}
		if r.get(id(all-1)) == nil || r.get(id(all-c.kept)) == nil || r.get(id(all-c.kept-1)) != nil {
			t.Errorf("%s: the newest are not the ones that are kept", name)
		}
	}
}
