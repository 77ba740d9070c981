package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// ebtStep is a run of a table of ebtables at a hook of the bridge.
func ebtStep(hook uint8, verdict int, hits ...events.Hit) *events.Step {
	before := &events.Packet{Data: make([]byte, 20), Mark: 1}
	return &events.Step{
		Place: &events.Place{PF: events.PFBridge, Hook: hook % 5}, Kind: events.StepTable, Verdict: verdict,
		Table: &events.TableRun{
			Name: "nat", ID: events.TableID{Private: 1, Gen: 2}, Hits: hits, Before: before, After: before,
			EBT: &events.EBTRun{Hook: hook, Verdict: verdict}, Part: &events.Part{},
		},
	}
}

// ebtTable has a chain FORWARD that leads to U, where a rule marks and returns.
func ebtTable() *symbolize.EBTTable {
	u := &symbolize.EBTChain{Name: "U", Hook: -1, Policy: symbolize.EBTReturn}
	base := &symbolize.EBTChain{Name: "FORWARD", Hook: 2, Policy: symbolize.EBTAccept}
	t := &symbolize.EBTTable{Name: "nat", Chains: []*symbolize.EBTChain{base, u}}
	add := func(c *symbolize.EBTChain, r symbolize.EBTRule) {
		r.Chain, r.Num, r.Index = c, len(c.Rules)+1, len(t.Rules)
		c.Rules = append(c.Rules, &r)
		t.Rules = append(t.Rules, &r)
	}
	add(base, symbolize.EBTRule{Target: "standard", Dest: u})
	add(base, symbolize.EBTRule{Target: "mark", Verdicts: []symbolize.EBTVerdict{symbolize.EBTContinue}})
	add(base, symbolize.EBTRule{Target: "standard", Verdicts: []symbolize.EBTVerdict{symbolize.EBTDrop}, Always: false})
	add(u, symbolize.EBTRule{Target: "mark", Verdicts: []symbolize.EBTVerdict{symbolize.EBTContinue}})
	add(u, symbolize.EBTRule{Target: "standard", Verdicts: []symbolize.EBTVerdict{symbolize.EBTReturn}, Always: true})
	return t
}

func ebtResolver(rs *ebtRuleset) *resolver {
	rs.id, rs.paths = events.TableID{Private: 1, Gen: 2}, map[string]*ebtPath{}
	eb := newEBTRulesets(&rulesets{})
	eb.generations.keep(rs.id, rs)
	return newResolver(nil, eb.rulesets, nil, eb, false)
}

func ebtRules(s *events.Step) string {
	var out []string
	for i, r := range s.Table.Rules {
		line := fmt.Sprintf("%d %s:%s:%d %s", r.Depth, r.Chain, r.Type, r.Num, r.Action)
		switch p, why := s.Table.Packet(i); {
		case p == nil:
			line += " ?" + strings.Fields(why)[0]
		default:
			line += fmt.Sprintf(" @%d", p.Mark)
		}
		out = append(out, line)
	}
	return strings.Join(out, ", ")
}

func TestEBTRules(t *testing.T) {
	once := func(idx ...int) (hits []events.Hit) {
		for _, i := range idx {
			hits = append(hits, events.Hit{Index: i, Packets: 1, Bytes: 84})
		}
		return hits
	}
	for _, tt := range []struct {
		name    string
		verdict int
		hits    []events.Hit
		behind  uint32
		want    string
	}{
		{"policy", events.NFAccept, nil, 0, "0 FORWARD:policy:4 ACCEPT @1"},
		{"drop", events.NFDrop, once(2), 0, "0 FORWARD:rule:3 DROP @1"},
		{"changed once", events.NFAccept, once(1), 9, "0 FORWARD:rule:2 continue @1, 0 FORWARD:policy:4 ACCEPT @9"},
		{"changed twice", events.NFAccept, once(0, 1, 3, 4), 9,
			"0 FORWARD:rule:1 jump U @1, 1 U:rule:1 continue @1, 1 U:return:2 RETURN ?more, 0 FORWARD:rule:2 continue ?more, 0 FORWARD:policy:4 ACCEPT @9"},
		{"changed by nobody", events.NFAccept, nil, 9, "0 FORWARD:policy:4 ACCEPT ?something"},
	} {
		s := ebtStep(2, tt.verdict, tt.hits...)
		if tt.behind != 0 {
			s.Table.EBT.Behind = &events.Packet{Mark: tt.behind}
		}
		r := ebtResolver(&ebtRuleset{table: ebtTable()})
		r.ebtRun(s)
		if got := ebtRules(s); got != tt.want || s.Table.Unresolved != "" {
			t.Errorf("%s: %s\ngot  %s\nwant %s", tt.name, s.Table.Unresolved, got, tt.want)
		}
		// The same again, from what is kept.
		again := *s.Table
		again.Rules, again.Met = nil, nil
		s.Table = &again
		r.ebtRun(s)
		if got := ebtRules(s); got != tt.want {
			t.Errorf("%s, again:\ngot  %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// What is kept of a run is kept for what the table returned, too.
func TestEBTSameHits(t *testing.T) {
	table := ebtTable()
	table.Rules[2].Verdicts = []symbolize.EBTVerdict{symbolize.EBTAccept, symbolize.EBTDrop}
	r := ebtResolver(&ebtRuleset{table: table})
	for verdict, want := range map[int]string{events.NFAccept: "ACCEPT", events.NFDrop: "DROP"} {
		s := ebtStep(2, verdict, events.Hit{Index: 2, Packets: 1})
		r.ebtRun(s)
		if got := ebtRules(s); got != "0 FORWARD:rule:3 "+want+" @1" {
			t.Errorf("verdict %d: %s %s", verdict, got, s.Table.Unresolved)
		}
	}
}

// What cannot be told is counted, and no rule is named.
func TestEBTUnresolved(t *testing.T) {
	hits := []events.Hit{{Index: 1, Packets: 2}}
	for name, tt := range map[string]struct {
		rs   *ebtRuleset
		hits []events.Hit
		why  string
	}{
		"not read": {&ebtRuleset{err: errors.New("the ruleset was replaced before it could be read")}, nil, "replaced before"},
		"no way":   {&ebtRuleset{table: ebtTable()}, hits, symbolize.ErrNoWalk.Error()},
	} {
		s := ebtStep(2, events.NFAccept, tt.hits...)
		r := ebtResolver(tt.rs)
		r.ebtRun(s)
		if !strings.Contains(s.Table.Unresolved, tt.why) || s.Table.Rules != nil || r.unresolved != 1 {
			t.Errorf("%s: %q, %d rules, %d counted", name, s.Table.Unresolved, len(s.Table.Rules), r.unresolved)
		}
	}
}

// A DROP of table broute is told as what it does.
func TestEBTBroute(t *testing.T) {
	table := &symbolize.EBTTable{Name: "broute", Chains: []*symbolize.EBTChain{{Name: "BROUTING", Hook: symbolize.EBTBrouting, Policy: symbolize.EBTDrop}}}
	s := ebtStep(events.HookBrouting, events.NFDrop)
	s.Table.EBT.Verdict, s.Verdict = events.NFDrop, events.NFAccept
	r := ebtResolver(&ebtRuleset{table: table})
	steps := []events.Step{*s}
	r.tablesOf(s.Table.Part, steps)
	if got := ebtRules(&steps[0]); got != "0 BROUTING:policy:1 DROP (route it) @1" {
		t.Error(got)
	}
	if !slices.ContainsFunc(steps[0].Table.Rules, func(r events.Rule) bool { return r.IsPolicy }) {
		t.Error("no policy")
	}
}
