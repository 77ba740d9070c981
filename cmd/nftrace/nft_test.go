package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// Handles of the tables of nftRules, and of their chains.
const (
	nativeTable, compatTable = 7, 8
	baseChain, chainA        = 1, 3
	chainB, natChain         = 5, 9
)

// nftRules are a table of nft's and one of iptables-nft's, alike but for their targets' names.
// Each rule's handle is 10 times its chain's plus its number.
func nftRules(gen uint32) *symbolize.NFTRuleset {
	table := func(handle uint64, family uint8, name string, compat bool, nat, base string) *symbolize.NFTTable {
		rules := func(chain uint64, targets ...string) []*symbolize.NFTRule {
			var all []*symbolize.NFTRule
			for i, target := range targets {
				target, conditional := strings.CutSuffix(target, "?")
				all = append(all, &symbolize.NFTRule{Handle: 10*chain + uint64(i) + 1, Target: target, Unconditional: !conditional,
					Text: fmt.Sprintf("rule %d of %d", i+1, chain)})
			}
			return all
		}
		return &symbolize.NFTTable{Family: family, Name: name, Handle: handle, Compat: compat, Chains: []*symbolize.NFTChain{
			{Name: base, Handle: baseChain, Base: true, Type: "filter", Hook: 1, Priority: 13, Policy: 1,
				Rules: rules(baseChain, "?", "", "reject", "queue", "masquerade", "log")},
			{Name: "A", Handle: chainA, Rules: rules(chainA, "?", "", "dnat")},
			{Name: "B", Handle: chainB, Rules: rules(chainB, "?")},
			{Name: nat, Handle: natChain, Base: true, Type: "nat", Hook: 1, Priority: -17, Policy: 1},
		}}
	}
	return symbolize.NewNFTRuleset(gen, []*symbolize.NFTTable{
		table(nativeTable, events.PFInet, "fw", false, "n", "in"),
		table(compatTable, events.PFIPv4, "filter", true, "N", "INPUT"),
	})
}

// nftStep is a run of a base chain that ended as its last event says.
func nftStep(table, base uint64, all ...events.NFTEvent) *events.Step {
	part := &events.Part{Before: *pkt(0, 64), Verdict: events.NFAccept}
	return nftStepOf(part, table, base, all...)
}

func nftStepOf(part *events.Part, table, base uint64, all ...events.NFTEvent) *events.Step {
	for i := range all {
		if all[i].Packet == nil {
			all[i].Packet = &part.Before
		}
	}
	return &events.Step{
		Place: &events.Place{Netns: 77, PF: events.PFIPv4, Hook: events.HookLocalIn},
		Kind:  events.StepTable, Verdict: all[len(all)-1].Code & 0xff,
		Table: &events.TableRun{Name: "fw", Part: part, Before: &part.Before,
			NFT: &events.NFTRun{Family: events.PFInet, Table: table, Base: base, Gen: 13, Events: all}},
	}
}

// didRule is the event of a rule of nftRules; chain is where it leads.
func didRule(handle uint64, code int, chain ...uint64) events.NFTEvent {
	e := events.NFTEvent{What: events.NFTRule, Rule: handle, Code: code}
	if len(chain) > 0 {
		e.Chain = chain[0]
	}
	return e
}

func didEnd(chain uint64) events.NFTEvent {
	return events.NFTEvent{What: events.NFTEnd, Chain: chain, Code: events.NFTContinue}
}

func didPolicy(code int) events.NFTEvent { return events.NFTEvent{What: events.NFTPolicy, Code: code} }

// rulesIn are rules as "DEPTH CHAIN:TYPE:NUM ACTION".
func rulesIn(rules []events.Rule) string {
	var all []string
	for i := range rules {
		r := &rules[i]
		s := fmt.Sprintf("%d %s:%s:%d %s", r.Depth, r.Chain, r.Type, r.Num, r.Action)
		if r.IsEnd {
			s += " end"
		}
		if r.IsPolicy {
			s += " policy"
		}
		all = append(all, s)
	}
	return strings.Join(all, ", ")
}

// What nf_tables told of, as the ruleset has it.
func TestNFTPath(t *testing.T) {
	const accept, drop, next, jump, goTo, back = events.NFAccept, events.NFDrop, events.NFTContinue, events.NFTJump, events.NFTGoto, events.NFTReturn
	type did = events.NFTEvent
	type list = []did
	for _, tt := range []struct {
		name   string
		compat bool
		did    list
		want   string
	}{
		{"a rule accepts", false, list{didRule(11, accept)}, "0 in:rule:1 ACCEPT"},
		{"a rule drops", false, list{didRule(11, drop)}, "0 in:rule:1 DROP"},
		{"no verdict", false, list{didRule(11, next), didRule(12, events.NFTBreak), didRule(12, drop)},
			"0 in:rule:1 continue, 0 in:rule:2 continue, 0 in:rule:2 DROP"},
		{"the policy accepts", false, list{didRule(11, next), didEnd(baseChain), didPolicy(accept)},
			"0 in:rule:1 continue, 0 in:policy:7 ACCEPT policy"},
		{"the policy drops, and nothing matched", false, list{didPolicy(drop)}, "0 in:policy:7 DROP policy"},
		{"jump, to the end", false, list{didRule(11, jump, chainA), didRule(31, next), didEnd(chainA), didEnd(baseChain), didPolicy(accept)},
			"0 in:rule:1 jump A, 1 A:rule:1 continue, 1 A:return:4 RETURN end, 0 in:policy:7 ACCEPT policy"},
		{"jump and return", false, list{didRule(11, jump, chainA), didRule(31, back), didRule(12, accept)},
			"0 in:rule:1 jump A, 1 A:rule:1 RETURN, 0 in:rule:2 ACCEPT"},
		{"two jumps", false, list{didRule(11, jump, chainA), didRule(31, jump, chainB), didEnd(chainB), didRule(32, back), didRule(12, drop)},
			"0 in:rule:1 jump A, 1 A:rule:1 jump B, 2 B:return:2 RETURN end, 1 A:rule:2 RETURN, 0 in:rule:2 DROP"},
		{"goto, to the end", false, list{didRule(11, goTo, chainA), didEnd(chainA), didPolicy(drop)},
			"0 in:rule:1 goto A, 1 A:return:4 RETURN end, 0 in:policy:7 DROP policy"},
		{"goto within a jump returns to where the jump was", false,
			list{didRule(11, jump, chainA), didRule(31, goTo, chainB), didRule(51, next), didEnd(chainB), didRule(12, accept)},
			"0 in:rule:1 jump A, 1 A:rule:1 goto B, 2 B:rule:1 continue, 2 B:return:2 RETURN end, 0 in:rule:2 ACCEPT"},
		{"jump within a goto", false,
			list{didRule(11, goTo, chainA), didRule(31, jump, chainB), didEnd(chainB), didRule(32, back), didPolicy(accept)},
			"0 in:rule:1 goto A, 1 A:rule:1 jump B, 2 B:return:2 RETURN end, 1 A:rule:2 RETURN, 0 in:policy:7 ACCEPT policy"},
		{"return in a base chain", false, list{didRule(11, back), didPolicy(accept)}, "0 in:rule:1 RETURN, 0 in:policy:7 ACCEPT policy"},
		{"goto, and its end is not told", false, list{didRule(11, goTo, chainA), didPolicy(drop)}, "0 in:rule:1 goto A, 0 in:policy:7 DROP policy"},
		{"nothing matched", false, list{didPolicy(accept)}, "0 in:policy:7 ACCEPT policy"},

		{"reject", false, list{didRule(13, drop)}, "0 in:rule:3 REJECT"},
		{"DNAT", false, list{didRule(11, jump, chainA), didRule(33, accept)}, "0 in:rule:1 jump A, 1 A:rule:3 DNAT"},
		{"DNAT that found no port", false, list{didRule(11, jump, chainA), didRule(33, drop)}, "0 in:rule:1 jump A, 1 A:rule:3 DROP"},
		{"MASQUERADE", false, list{didRule(15, accept)}, "0 in:rule:5 MASQUERADE"},
		{"log does not end it", false, list{didRule(16, accept)}, "0 in:rule:6 ACCEPT"},
		{"reject that did not", false, list{didRule(13, next), didPolicy(accept)}, "0 in:rule:3 continue, 0 in:policy:7 ACCEPT policy"},
		{"queue 11", false, list{didRule(14, 11<<16|events.NFQueue)}, "0 in:rule:4 QUEUE"},
		{"stolen", false, list{didRule(11, events.NFStolen)}, "0 in:rule:1 STOLEN"},
		{"repeat", false, list{didRule(11, events.NFRepeat)}, "0 in:rule:1 verdict 4"},

		// As TRACE says of rules without a condition.
		{"ACCEPT in a base chain", true, list{didRule(12, accept)}, "0 INPUT:policy:2 ACCEPT"},
		{"DROP in a base chain", true, list{didRule(12, drop)}, "0 INPUT:policy:2 DROP"},
		{"RETURN in a base chain", true, list{didRule(12, back), didPolicy(accept)}, "0 INPUT:policy:2 RETURN, 0 INPUT:policy:7 ACCEPT policy"},
		{"RETURN in a user chain", true, list{didRule(11, jump, chainA), didRule(32, back), didRule(12, drop)},
			"0 INPUT:rule:1 jump A, 1 A:return:2 RETURN, 0 INPUT:policy:2 DROP"},
		{"ACCEPT in a user chain", true, list{didRule(11, jump, chainA), didRule(32, accept)}, "0 INPUT:rule:1 jump A, 1 A:return:2 ACCEPT"},
		{"a jump without a condition", true, list{didRule(12, jump, chainA), didRule(31, drop)}, "0 INPUT:rule:2 jump A, 1 A:rule:1 DROP"},
		{"no target", true, list{didRule(12, next), didPolicy(drop)}, "0 INPUT:rule:2 continue, 0 INPUT:policy:7 DROP policy"},
		{"a condition", true, list{didRule(11, accept)}, "0 INPUT:rule:1 ACCEPT"},
		{"a target", true, list{didRule(13, drop)}, "0 INPUT:rule:3 REJECT"},
		{"native, without a condition", false, list{didRule(12, drop)}, "0 in:rule:2 DROP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := uint64(nativeTable)
			if tt.compat {
				table = compatTable
			}
			p, err := newNFTPath(nftRules(13), nftStep(table, baseChain, tt.did...))
			if err != nil {
				t.Fatal(err)
			}
			if got := rulesIn(p.rules); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if p.compat != tt.compat || p.kind != "filter" || p.priority != 13 || p.chain != map[bool]string{true: "INPUT", false: "in"}[tt.compat] {
				t.Errorf("path %+v", p)
			}
			for i, n := range p.of {
				e, r := &tt.did[n], &p.rules[i]
				text := ""
				if e.What == events.NFTRule {
					text = fmt.Sprintf("rule %d of %d", e.Rule%10, e.Rule/10)
				}
				if r.Handle != e.Rule || r.Text != text {
					t.Errorf("rule %d: %+v of event %+v", i, r, e)
				}
			}
		})
	}
}

// A base chain is there before the commit that brings it, and without its rules.
func TestNFTPathNotInForce(t *testing.T) {
	for _, did := range [][]events.NFTEvent{{didPolicy(events.NFAccept)}, {didEnd(2), didPolicy(events.NFAccept)}} {
		s := nftStep(nativeTable, 2, did...)
		s.Table.NFT.Chain = "new"
		p, err := newNFTPath(nftRules(13), s)
		if err != nil || len(p.rules) != 1 || p.of[0] != len(did)-1 || p.chain != "new" || p.compat {
			t.Fatalf("%+v, %v", p, err)
		}
		if r := p.rules[0]; r.Chain != "new" || r.Type != events.TypePolicy || r.Num != 1 || !r.IsPolicy || r.Action != "ACCEPT" {
			t.Errorf("%+v", r)
		}
	}
}

func TestNFTPathUnknown(t *testing.T) {
	for _, tt := range []struct {
		name        string
		table, base uint64
		did         []events.NFTEvent
		want        string // a part of the error
	}{
		{"the table", 2, baseChain, []events.NFTEvent{didRule(11, events.NFAccept)}, "handle 11: the ruleset was replaced meanwhile"},
		{"the base chain", nativeTable, 2, []events.NFTEvent{didRule(11, events.NFTContinue), didEnd(2), didRule(13, events.NFDrop)}, "handles 11, 13: "},
		{"the table, and no rule was met", 2, baseChain, []events.NFTEvent{didEnd(3), didPolicy(events.NFDrop)}, "no rule: "},
		{"a rule", nativeTable, baseChain, []events.NFTEvent{didRule(11, events.NFTContinue), didRule(17, events.NFDrop)}, "handle 17: "},
		{"where a rule leads", nativeTable, baseChain, []events.NFTEvent{didRule(11, events.NFTJump, 2)}, "handle 11: it leads to a chain that is not there"},
		{"a chain that ended", nativeTable, baseChain, []events.NFTEvent{didRule(11, events.NFTJump, chainA), didEnd(2)}, "handle 11: "},
		{"what was done", nativeTable, baseChain, []events.NFTEvent{{What: 5}}, "unknown to nftrace (5)"},
	} {
		p, err := newNFTPath(nftRules(13), nftStep(tt.table, tt.base, tt.did...))
		if err == nil || p != nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v, want %q", tt.name, p, err, tt.want)
		}
	}
}

// nftResolver knows these rulesets.
func nftResolver(all ...*nftRuleset) *resolver {
	r := resolverOf()
	r.nft = newNFTRulesets(nil, nil, &speaker{})
	for _, rs := range all {
		r.nft.keep(nftID{77, rs.gen()}, rs)
	}
	return r
}

func known(rules *symbolize.NFTRuleset) *nftRuleset {
	return &nftRuleset{NFTRuleset: rules, paths: map[string]*nftPath{}}
}

func (rs *nftRuleset) gen() uint32 {
	if rs.NFTRuleset == nil {
		return 13
	}
	return rs.Gen
}

// empty is a ruleset without tables.
func empty(gen uint32) *nftRuleset { return known(symbolize.NewNFTRuleset(gen, nil)) }

func TestNFTRun(t *testing.T) {
	lost := &nftRuleset{err: errors.New("it is gone")}
	for _, tt := range []struct {
		name  string
		known []*nftRuleset
		want  string // rules, or why they are not known
	}{
		{"known", []*nftRuleset{known(nftRules(13))}, "0 in:rule:1 DROP"},
		{"of the generation before", []*nftRuleset{known(nftRules(12)), empty(13)}, "0 in:rule:1 DROP"},
		{"not of the one behind", []*nftRuleset{empty(13), known(nftRules(14))}, "handle 11: the ruleset was replaced meanwhile"},
		{"not of one long before", []*nftRuleset{known(nftRules(11)), empty(13)}, "handle 11: the ruleset was replaced meanwhile"},
		{"nor of the one before", []*nftRuleset{empty(12), empty(13)}, "handle 11: the ruleset was replaced meanwhile"},
		{"lost", []*nftRuleset{lost}, "handle 11: it is gone"},
		{"lost, though one with its handle came before: it may have had another number", []*nftRuleset{known(nftRules(12)), lost}, "handle 11: it is gone"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := nftResolver(tt.known...)
			var first *events.Rule
			for n := range 2 { // the second time from the cache
				s := nftStep(nativeTable, baseChain, didRule(11, events.NFDrop))
				r.nftRun(s)
				got, unresolved := rulesIn(s.Table.Rules), uint64(0)
				if s.Table.Unresolved != "" {
					got, unresolved = got+s.Table.Unresolved, uint64(n+1)
				}
				if got != tt.want || r.unresolved != unresolved {
					t.Errorf("%q, %d unresolved, want %q", got, r.unresolved, tt.want)
				}
				if rules := s.Table.Rules; len(rules) > 0 {
					if n > 0 && &rules[0] != first {
						t.Error("it was worked out again")
					}
					first = &rules[0]
				}
				if known := s.Table.NFT.Chain == "in"; known != (unresolved == 0) {
					t.Errorf("run %+v", s.Table.NFT)
				}
			}
		})
	}
	// What events does not know stays so, though the rules are known.
	r := nftResolver(known(nftRules(13)))
	s := nftStep(nativeTable, natChain, didPolicy(events.NFAccept))
	s.Table.Unresolved = "for some reason"
	r.nftRun(s)
	if n := s.Table.NFT; s.Table.Unresolved != "for some reason" || s.Table.Rules != nil || r.unresolved != 1 || n.Chain != "n" || n.Type != "nat" || n.Priority != -17 {
		t.Errorf("run %+v, %+v", s.Table, n)
	}
}

// A run that began about when its generation came into force may have met the one before.
func TestNFTRunFlipped(t *testing.T) {
	const replaced = "handle 11: the ruleset was replaced while the packet was in it"
	moved := nftRules(12)
	in := moved.Chain(nativeTable, baseChain)
	in.Rules = append([]*symbolize.NFTRule{{Handle: 99, Text: "counter"}}, in.Rules...)
	moved = symbolize.NewNFTRuleset(12, moved.Tables)
	rule, policy := didRule(11, events.NFDrop), didPolicy(events.NFAccept)
	for _, tt := range []struct {
		name   string
		before *nftRuleset
		did    events.NFTEvent
		want   string
	}{
		{"the same", known(nftRules(12)), rule, "0 in:rule:1 DROP"},
		{"it was not there", empty(12), rule, "0 in:rule:1 DROP"},
		{"it had another number", known(moved), rule, replaced},
		{"nobody knows", nil, rule, replaced},
		{"nobody can know", &nftRuleset{err: errors.New("it is gone")}, rule, replaced},
		{"the chain was empty", empty(12), policy, "no rule: " + replaced[len("handle 11: "):]},
	} {
		r := nftResolver(known(nftRules(13)))
		if tt.before != nil {
			r.nft.keep(nftID{77, 12}, tt.before)
		}
		s := nftStep(nativeTable, baseChain, tt.did)
		s.Table.NFT.Flipped = true
		r.nftRun(s)
		if got := rulesIn(s.Table.Rules) + s.Table.Unresolved; got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// Prefixes of lines are those of the table that they are of.
func TestNFTTracePrefix(t *testing.T) {
	r := nftResolver(known(nftRules(13)))
	for table, want := range map[uint64]string{nativeTable: "TRACE: inet:fw:in:rule:1 ", compatTable: "TRACE: fw:INPUT:rule:1 "} {
		s := nftStep(table, baseChain, didRule(11, events.NFDrop))
		r.nftRun(s)
		if got := s.Table.Rules[0].TracePrefix; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// Each rule gets the packet that nf_tables told.
func TestNFTPackets(t *testing.T) {
	one, two := pkt(1, 64), pkt(2, 64)
	for _, tt := range []struct {
		name   string
		did    []events.NFTEvent
		behind *events.Packet
		want   []packetRule
		after  int // mark; -1: not known
	}{
		{"nothing changes", []events.NFTEvent{didRule(11, -1), didEnd(baseChain), didPolicy(events.NFAccept)}, nil,
			[]packetRule{{0, 64, ""}, {0, 64, ""}}, 0},
		{"changed twice", []events.NFTEvent{didRule(11, -1), {What: events.NFTRule, Rule: 12, Code: -1, Packet: one},
			{What: events.NFTEnd, Chain: baseChain, Code: -1, Packet: two}, {What: events.NFTPolicy, Code: events.NFAccept, Packet: two}}, nil,
			[]packetRule{{0, 64, ""}, {1, 64, ""}, {2, 64, ""}}, 2},
		{"changed by the last", []events.NFTEvent{didRule(11, -1), didRule(12, events.NFAccept)}, two,
			[]packetRule{{0, 64, ""}, {0, 64, ""}}, 2},
		{"changed by the last, which drops it", []events.NFTEvent{didRule(12, events.NFDrop)}, two, []packetRule{{0, 64, ""}}, -1},
		{"unsure", []events.NFTEvent{{What: events.NFTRule, Rule: 11, Code: -1, Unsure: true}, {What: events.NFTRule, Rule: 12, Code: events.NFAccept, Packet: one}}, nil,
			[]packetRule{not("something at the hook before it"), {1, 64, ""}}, 1},
		{"unsure, the last", []events.NFTEvent{{What: events.NFTRule, Rule: 11, Code: events.NFAccept, Unsure: true}}, one,
			[]packetRule{not("something at the hook before it")}, 1},
		{"not seen at all", []events.NFTEvent{{What: events.NFTRule, Rule: 11, Code: events.NFAccept, Unsure: true}}, nil,
			[]packetRule{not("something at the hook before it")}, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := nftResolver(known(nftRules(13)))
			s := nftStep(nativeTable, baseChain, tt.did...)
			s.Table.NFT.Behind = tt.behind
			r.nftRun(s)
			if len(s.Table.Rules) != len(tt.want) {
				t.Fatalf("%s, %q", rulesIn(s.Table.Rules), s.Table.Unresolved)
			}
			checkPackets(t, s.Table, tt.want)
			if p := s.Table.After; (p != nil) != (tt.after >= 0) || p != nil && int(p.Mark) != tt.after {
				t.Errorf("behind it %+v, want mark %d", p, tt.after)
			}
		})
	}
}

// The cache keeps apart what newNFTPath looks at.
func TestNFTKey(t *testing.T) {
	keys := map[string]string{}
	add := func(name string, change func(s *events.Step)) {
		s := nftStep(nativeTable, baseChain, didRule(11, events.NFTJump, chainA), didRule(31, events.NFDrop))
		change(s)
		k := string(nftKey(nil, s))
		if other, ok := keys[k]; ok {
			t.Errorf("%q and %q have the same key", name, other)
		}
		keys[k] = name
	}
	event := func(change func(e *events.NFTEvent)) func(s *events.Step) {
		return func(s *events.Step) { change(&s.Table.NFT.Events[1]) }
	}
	add("it", func(*events.Step) {})
	add("family", func(s *events.Step) { s.PF = events.PFIPv6 })
	add("hook", func(s *events.Step) { s.Hook = events.HookForward })
	add("table", func(s *events.Step) { s.Table.NFT.Table = compatTable })
	add("base chain", func(s *events.Step) { s.Table.NFT.Base = natChain })
	add("fewer events", func(s *events.Step) { s.Table.NFT.Events = s.Table.NFT.Events[:1] })
	add("more events", func(s *events.Step) { s.Table.NFT.Events = append(s.Table.NFT.Events, didPolicy(events.NFAccept)) })
	add("what", event(func(e *events.NFTEvent) { e.What = events.NFTEnd }))
	add("rule", event(func(e *events.NFTEvent) { e.Rule = 32 }))
	add("rule of more than 32 bits", event(func(e *events.NFTEvent) { e.Rule |= 1 << 40 }))
	add("chain", event(func(e *events.NFTEvent) { e.Chain = chainB }))
	add("verdict", event(func(e *events.NFTEvent) { e.Code = events.NFAccept }))
	add("queue", event(func(e *events.NFTEvent) { e.Code = 3<<16 | events.NFQueue }))
	add("another queue", event(func(e *events.NFTEvent) { e.Code = 5<<16 | events.NFQueue }))
}

func TestInOrder(t *testing.T) {
	const accept, drop = events.NFAccept, events.NFDrop
	nft := func(name, kind string, priority, verdict int, runs ...int) events.Step {
		run := &events.NFTRun{Type: kind, Priority: priority}
		if len(runs) > 0 {
			run.Runs = runs[0]
		}
		return events.Step{Verdict: verdict, Table: &events.TableRun{Name: name, NFT: run}}
	}
	legacy := func(name string, verdict int) events.Step {
		return events.Step{Verdict: verdict, Table: &events.TableRun{Name: name}}
	}
	type steps = []events.Step
	for _, tt := range []struct {
		name        string
		hook        uint8
		nft, legacy steps
		want        string
	}{
		{"by priority", events.HookPreRouting, steps{nft("a", "filter", -301, accept), nft("b", "filter", -200, accept), nft("c", "filter", 1, accept)},
			steps{legacy("raw", accept), legacy("mangle", accept)}, "a raw b mangle c"},
		{"all tables", events.HookLocalIn, steps{nft("a", "filter", -151, accept), nft("b", "filter", -1, accept), nft("c", "filter", 49, accept), nft("d", "filter", 99, accept)},
			steps{legacy("mangle", accept), legacy("filter", accept), legacy("security", accept), legacy("nat", accept)}, "a mangle b filter c security d nat"},
		{"NAT, early", events.HookPreRouting, steps{nft("a", "filter", -101, accept), nft("b", "filter", -99, accept)}, steps{legacy("nat", accept)}, "a nat b"},
		{"NAT at OUTPUT", events.HookLocalOut, steps{nft("a", "filter", -101, accept), nft("b", "filter", -99, accept)}, steps{legacy("nat", accept)}, "a nat b"},
		{"NAT, late", events.HookPostRouting, steps{nft("a", "filter", 99, accept), nft("b", "filter", 101, accept)}, steps{legacy("nat", accept)}, "a nat b"},
		{"NAT of nf_tables, whatever it says", events.HookPostRouting, steps{nft("a", "nat", -300, accept)}, steps{legacy("mangle", accept)}, "mangle a"},
		{"NAT of nf_tables, early", events.HookPreRouting, steps{nft("a", "nat", 300, accept)}, steps{legacy("mangle", accept), legacy("nat", accept)}, "mangle a nat"},
		{"route", events.HookLocalOut, steps{nft("a", "route", -149, accept)}, steps{legacy("mangle", accept), legacy("filter", accept)}, "mangle a filter"},
		{"equal, both accept", events.HookForward, steps{nft("a", "filter", 0, accept)}, steps{legacy("filter", accept)}, "a filter"},
		{"equal, xtables drops", events.HookForward, steps{nft("a", "filter", 0, accept)}, steps{legacy("filter", drop)}, "a filter"},
		{"equal, nf_tables drops", events.HookForward, steps{nft("a", "filter", 0, drop)}, steps{legacy("filter", accept)}, "filter a"},
		{"equal, nf_tables queues", events.HookForward, steps{nft("a", "filter", 0, events.NFQueue)}, steps{legacy("filter", accept)}, "filter a"},
		{"equal, xtables ran first", events.HookForward, steps{nft("a", "filter", 0, accept, 1), nft("b", "filter", 10, accept, 1)}, steps{legacy("filter", accept)}, "filter a b"},
		{"equal, one of xtables' ran first", events.HookForward, steps{nft("a", "filter", 0, accept, 1)}, steps{legacy("mangle", accept), legacy("filter", accept)}, "mangle a filter"},
		{"equal, xtables is not known", events.HookForward, steps{nft("a", "filter", 0, accept)}, steps{legacy("filter", events.VerdictUnknown)}, "a filter"},
		{"equal, nf_tables is not known", events.HookForward, steps{nft("a", "filter", 0, events.VerdictUnknown)}, steps{legacy("filter", accept)}, "a filter"},
		{"nothing of xtables", events.HookForward, steps{nft("b", "filter", 1, accept), nft("a", "filter", 0, accept)}, nil, "b a"},
	} {
		all := append(append(steps{}, tt.nft...), tt.legacy...)
		for i := range all {
			all[i].Place = &events.Place{Hook: tt.hook}
		}
		var got []string
		for _, s := range inOrder(all, len(tt.nft)) {
			got = append(got, s.Table.Name)
		}
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, g, tt.want)
		}
	}
}

// A journey through tables of both engines, and who decided.
func TestResolveBothEngines(t *testing.T) {
	for _, tt := range []struct {
		name        string
		verdict     int // of the hook
		did         events.NFTEvent
		rule        rule // of the legacy table
		order       string
		kind        events.OutcomeKind
		step, rule0 int
	}{
		{"accepted by both", events.NFAccept, didRule(11, events.NFAccept), rule{cond: true, target: "ACCEPT"}, "filter fw", events.OutUnknown, -1, -1},
		{"dropped by nf_tables", events.NFDrop, didRule(11, events.NFDrop), rule{cond: true, target: "ACCEPT"}, "filter fw", events.OutDropped, 1, 0},
		{"queued by nf_tables", events.VerdictUnknown, didRule(11, 7<<16|events.NFQueue), rule{cond: true, target: "ACCEPT"}, "filter fw", events.OutQueued, 1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := nftResolver(known(nftRules(13)))
			r.tables = resolverOf(inputTable(t, []rule{tt.rule}, nil)).tables
			part := &events.Part{Before: *pkt(0, 64)}
			j := journeyOf(events.NFAccept, part, hits(0, 1))
			part.Before.Len = 84
			j.Steps = append([]events.Step{*nftStepOf(part, nativeTable, baseChain, tt.did)}, j.Steps...)
			j.Steps[2].Verdict = tt.verdict
			j.Conclude()
			r.journey(j)
			if got := j.Steps[0].Table.Name + " " + j.Steps[1].Table.Name; got != tt.order {
				t.Errorf("%s, want %s", got, tt.order)
			}
			if o := j.Outcome; o.Kind != tt.kind || o.Step != tt.step || o.Rule != tt.rule0 || o.NetnsName != "c1" {
				t.Errorf("outcome %+v", o)
			}
			for i := range 2 {
				if s := &j.Steps[i]; s.Table.Unresolved != "" || len(s.Table.Rules) != 1 || s.NetnsName != "c1" {
					t.Errorf("step %d: %+v", i, s.Table)
				}
			}
		})
	}
}

// The oldest generations are forgotten when there is too much of them, the newest few never.
func TestNFTRulesetsAreBounded(t *testing.T) {
	id := func(n int) nftID { return nftID{77, uint32(n)} }
	for name, c := range map[string]struct {
		rules, kept int
	}{
		"small": {rules: maxKept/1000 - 2, kept: 1000},
		"large": {rules: maxKept, kept: leastKept},
	} {
		r := newNFTRulesets(nil, nil, nil)
		rules := &symbolize.NFTRuleset{Tables: []*symbolize.NFTTable{{Chains: []*symbolize.NFTChain{{Rules: make([]*symbolize.NFTRule, c.rules)}}}}}
		const all = 1013
		for n := range all {
			r.keep(id(n), &nftRuleset{NFTRuleset: rules})
			if n%7 == 0 {
				r.keep(id(n), &nftRuleset{NFTRuleset: rules}) // again
			}
		}
		if len(r.known) != c.kept || len(r.order) != c.kept || r.total != c.kept*(c.rules+2) {
			t.Errorf("%s: %d known, %d in order, %d rules; want %d rulesets", name, len(r.known), len(r.order), r.total, c.kept)
		}
		if r.get(id(all-1)) == nil || r.get(id(all-c.kept)) == nil || r.get(id(all-c.kept-1)) != nil {
			t.Errorf("%s: the newest are not the ones that are kept", name)
		}
	}
	// One that was lost counts, too, and is found again.
	r := newNFTRulesets(nil, nil, nil)
	lost := &nftRuleset{err: errors.New("it is gone")}
	r.keep(id(13), lost)
	if r.total != 1 || r.find(id(13)) != lost {
		t.Errorf("%d rules, %+v", r.total, r.find(id(13)))
	}
}

// What xtables' tables met where a rule of nf_tables sets mark 7 at the same hook, at priority
// 13: those before it an unmarked packet.
func TestNFTChangesPacket(t *testing.T) {
	marked := pkt(7, 64)
	for _, tt := range []struct {
		name         string
		unresolved   bool // nf_tables' rules are not known
		afterNAT     bool
		mangle       rule
		first, again []packetRule // of tables mangle (-150) and security (50)
	}{
		{"between them", false, false, rule{cond: true}, []packetRule{{0, 64, ""}, {0, 64, ""}}, []packetRule{not("nf_tables"), not("nf_tables")}},
		{"the first marks it, too", false, false, markIf(3), []packetRule{{0, 64, ""}, {3, 64, ""}}, []packetRule{not("nf_tables"), not("nf_tables")}},
		{"the first does something unknown", false, false, rule{cond: true, target: "NOBODYKNOWS"},
			[]packetRule{{0, 64, ""}, not("NOBODYKNOWS")}, []packetRule{not("nf_tables"), not("nf_tables")}},
		{"nobody knows where", true, false, rule{cond: true}, []packetRule{not("nf_tables"), not("nf_tables")}, []packetRule{not("nf_tables"), not("nf_tables")}},
		{"behind NAT", false, true, rule{cond: true}, []packetRule{not("nf_tables"), not("nf_tables")}, []packetRule{not("nf_tables"), not("nf_tables")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules := known(nftRules(13))
			if tt.unresolved {
				rules = empty(13)
			}
			r := nftResolver(rules)
			mangle := namedTable(t, "mangle", []rule{tt.mangle}, nil)
			security := namedTable(t, "security", []rule{{cond: true}}, nil)
			r.tables = resolverOf(mangle, security).tables
			part := &events.Part{Before: *pkt(0, 64), After: marked, Changed: true, AfterNAT: tt.afterNAT}
			part.Before.Len, marked.Len = 84, 84
			j := journeyOf(events.NFAccept, part, hits(0, 1, 1, 1), hits(0, 1, 1, 1))
			j.Steps[0].Table.Name, j.Steps[1].Table.Name = "mangle", "security"
			nft := nftStepOf(part, nativeTable, baseChain, didRule(11, events.NFTContinue),
				events.NFTEvent{What: events.NFTRule, Rule: 12, Code: events.NFAccept, Packet: marked})
			j.Steps = append([]events.Step{*nft}, j.Steps...)
			r.journey(j)
			for i := range 3 {
				s := &j.Steps[i]
				switch s.Table.Name {
				case "mangle":
					checkPackets(t, s.Table, tt.first)
				case "security":
					checkPackets(t, s.Table, tt.again)
					if s.Table.After != nil {
						t.Errorf("behind it: %+v", s.Table.After)
					}
				}
				if s.Table.NFT == nil && (len(s.Table.Rules) != 2 || len(s.Table.Met) == 0) {
					t.Errorf("table %s: %q, %+v", s.Table.Name, s.Table.Unresolved, s.Table.Rules)
				}
			}
		})
	}
}

// A run of ebtables takes back nothing that is said of xtables' tables, nor hides what nf_tables did.
func TestBehindNFTAndEBT(t *testing.T) {
	for _, changed := range []bool{false, true} {
		part := &events.Part{Before: *pkt(0, 64), Changed: true}
		did := didRule(11, events.NFAccept)
		if changed {
			did.Packet = pkt(7, 64)
		}
		security := runOf(t, "security", part, events.NFAccept, []rule{{cond: true}})
		packetsOf([]tableRun{security}, nil)
		behindNFT([]events.Step{*ebtStep(events.HookForward, events.NFAccept), *nftStepOf(part, nativeTable, baseChain, did), *security.step}, 2)
		want := packetRule{0, 64, ""}
		if changed {
			want = not("nf_tables")
		}
		checkPackets(t, security.step.Table, []packetRule{want})
	}
}

// Behind nf_tables' rules that changed it, legacy rules are not held against the addresses that
// the packet came with.
func TestNFTChangesAddresses(t *testing.T) {
	for _, changed := range []bool{false, true} {
		part := &events.Part{Before: *pkt(0, 64), Changed: changed}
		part.Before.Data[12] = 11 // no rule with a condition fits 11.0.0.1
		part.Before.Len = 84
		r := nftResolver(known(nftRules(13)))
		r.tables = resolverOf(inputTable(t, []rule{{cond: true, target: "ACCEPT"}}, nil)).tables
		j := journeyOf(events.NFAccept, part, hits(0, 1))
		r.journey(j)
		if known := j.Steps[0].Table.Unresolved == ""; known != changed {
			t.Errorf("changed %v: %q", changed, j.Steps[0].Table.Unresolved)
		}
	}
}

// The first change of a namespace's nf_tables is a new namespace's: nothing is known of it that was
// known of one that had its number before.
func TestNamespaceAgain(t *testing.T) {
	r := newNFTRulesets(&symbolize.System{}, nil, &speaker{})
	old := &nftRuleset{NFTRuleset: &symbolize.NFTRuleset{}}
	for _, id := range []nftID{{77, 2}, {77, 3}, {78, 2}, {78, 3}} {
		r.keep(id, old)
	}
	r.committed(nftID{77, 3})
	if r.get(nftID{77, 2}) != old {
		t.Error("a later change is taken for the first one")
	}
	r.committed(nftID{77, firstGen})
	if rs := r.get(nftID{77, 2}); rs == old || r.get(nftID{77, 3}) != nil {
		t.Errorf("of the old namespace is known %+v, %+v", rs, r.get(nftID{77, 3}))
	}
	if r.get(nftID{78, 2}) != old || r.get(nftID{78, 3}) != old {
		t.Error("another namespace was forgotten")
	}
	// Who follows a namespace keeps it alive.
	r.followers[78] = &nftFollower{netns: 78}
	r.committed(nftID{78, firstGen})
	if r.get(nftID{78, 2}) != old {
		t.Error("a namespace that is followed was forgotten")
	}
}

// A generation that is in force, and was forgotten for there was too much to keep, is read again.
func TestNFTForgotten(t *testing.T) {
	const none = 1 // no namespace has this number
	r := newNFTRulesets(&symbolize.System{}, nil, nil)
	f := &nftFollower{NFTFollower: &symbolize.NFTFollower{}, netns: none}
	f.gen.Store(13)
	r.followers[none] = f
	rs := r.find(nftID{none, 13})
	if rs == nil || rs.err == nil || !strings.Contains(rs.err.Error(), "could not be read") {
		t.Fatalf("got %+v, which was not asked for again", rs)
	}
	if r.followed(none) != nil {
		t.Error("who forgot it is still asked")
	}
	// One that is not in force any more is not.
	r.followers[none] = f
	if rs := r.find(nftID{none, 12}); rs == nil || rs.err == nil || !strings.Contains(rs.err.Error(), "replaced") || r.followed(none) != f {
		t.Errorf("got %+v", rs)
	}
}
