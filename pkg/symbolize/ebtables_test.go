package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"
)

// ebtChainDef is a chain of a table to be built; hook is -1 for others than built-in ones.
type ebtChainDef struct {
	name   string
	policy EBTVerdict
	rules  []ebtRuleDef
}

// ebtRuleDef is a rule: to is a chain that it jumps to.
type ebtRuleDef struct {
	to      string
	verdict EBTVerdict
	always  bool   // but for match
	match   string // an extension
	ask     []byte // its data
	mac     bool   // asks for an address
	target  string // an extension, with data
	data    []byte
}

// buildEBT makes what the kernel would give of a table.
func buildEBT(hooks uint32, defs []ebtChainDef) (ebtInfo, []byte) {
	at := map[string]int{}
	size, entries := 0, 0
	matches := func(r *ebtRuleDef) int {
		if r.match != "" {
			return ebtExtHead + len(r.ask)
		}
		return 0
	}
	length := func(r *ebtRuleDef) int {
		if r.target != "" {
			return ebtEntrySize + matches(r) + ebtExtHead + len(r.data)
		}
		return ebtEntrySize + matches(r) + ebtExtHead + 8
	}
	for _, d := range defs {
		at[d.name] = size
		size += ebtHeadSize
		for i := range d.rules {
			size += length(&d.rules[i])
		}
	}
	blob := make([]byte, size)
	off := 0
	put := func(at int, v uint32) { binary.NativeEndian.PutUint32(blob[at:], v) }
	for _, d := range defs {
		copy(blob[off+4:off+4+ebtNameSize], d.name)
		put(off+36, uint32(entries))
		put(off+40, uint32(d.policy))
		put(off+44, uint32(len(d.rules)))
		off += ebtHeadSize
		for i := range d.rules {
			r := &d.rules[i]
			n := length(r)
			flags := uint32(ebtFlagEntry | ebtFlagNoProt)
			if !r.always {
				flags = ebtFlagEntry
				binary.BigEndian.PutUint16(blob[off+8:], 0x0800)
			}
			if r.mac {
				flags |= ebtFlagSrc
			}
			put(off, flags)
			if r.match != "" {
				copy(blob[off+ebtEntrySize:], r.match)
				put(off+ebtEntrySize+32, uint32(len(r.ask)))
				copy(blob[off+ebtEntrySize+ebtExtHead:], r.ask)
			}
			t := off + ebtEntrySize + matches(r)
			put(off+100, uint32(t-off))
			put(off+104, uint32(t-off))
			put(off+108, uint32(n))
			if r.target != "" {
				copy(blob[t:], r.target)
				put(t+32, uint32(len(r.data)))
				copy(blob[t+ebtExtHead:], r.data)
			} else {
				copy(blob[t:], ebtStandard)
				put(t+32, 8)
				v := uint32(r.verdict)
				if r.to != "" {
					v = uint32(at[r.to])
				}
				put(t+ebtExtHead, v)
			}
			off += n
			entries++
		}
	}
	return ebtInfo{hooks, uint32(entries), uint32(size)}, blob
}

// seq are the numbers below n.
func seq(n int) (s []int) {
	for i := range n {
		s = append(s, i)
	}
	return s
}

func verdictRule(v EBTVerdict) ebtRuleDef { return ebtRuleDef{verdict: v} }
func always(v EBTVerdict) ebtRuleDef      { return ebtRuleDef{verdict: v, always: true} }
func varies(v EBTVerdict) ebtRuleDef      { return ebtRuleDef{verdict: v, always: true, match: "limit"} }
func jumpTo(chain string) ebtRuleDef      { return ebtRuleDef{to: chain} }

// marked is a rule with a match mark_m.
func marked(mark, mask uint64, not, anyBit bool, v EBTVerdict) ebtRuleDef {
	ask := make([]byte, 24)
	binary.NativeEndian.PutUint64(ask, mark)
	binary.NativeEndian.PutUint64(ask[8:], mask)
	ask[17] = 1
	if not {
		ask[16] = 1
	}
	if anyBit {
		ask[17] = 2
	}
	return ebtRuleDef{verdict: v, always: true, match: "mark_m", ask: ask}
}

// filterEBT is a table filter: INPUT, FORWARD, OUTPUT and chains of its own.
func filterEBT(t testing.TB, forward []ebtRuleDef, user ...ebtChainDef) *EBTTable {
	t.Helper()
	info, blob := buildEBT(1<<input|1<<2|1<<output, append([]ebtChainDef{
		{"INPUT", EBTAccept, nil}, {"FORWARD", EBTDrop, forward}, {"OUTPUT", EBTAccept, nil},
	}, user...))
	table, err := parseEBT("filter", info, blob)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func ebtLines(visits []EBTVisit) string {
	var s []string
	for _, v := range visits {
		what := "end"
		if v.Rule != nil {
			what = fmt.Sprint(v.Rule.Num)
		}
		verdict := v.Verdict.String()
		if v.Rule != nil && v.Rule.Dest != nil {
			verdict = "jump " + v.Rule.Dest.Name
		}
		s = append(s, fmt.Sprintf("%d:%s:%s:%s", v.Depth, v.Chain.Name, what, verdict))
	}
	return strings.Join(s, " ")
}

func TestEBTWalk(t *testing.T) {
	// What a rule says beside the verdict: how it sets the mark, whether snat rewrites ARP.
	const markOr, markAnd, markXor, snatARP = 0x10, 0x20, 0x30, 0x10
	other := func(target string, v EBTVerdict, without uint32) ebtRuleDef {
		data := make([]byte, 16)
		binary.NativeEndian.PutUint64(data, 7)
		binary.NativeEndian.PutUint32(data[8:], uint32(v)&^without)
		return ebtRuleDef{target: target, data: data}
	}
	twice := []ebtRuleDef{jumpTo("U"), jumpTo("U")}
	userChain := func(rules ...ebtRuleDef) []ebtChainDef { return []ebtChainDef{{"U", EBTReturn, rules}} }
	dnat := other("dnat", EBTAccept, 0)
	reply := ebtRuleDef{target: "arpreply", data: append(make([]byte, 8), 0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0)}
	for _, tt := range []struct {
		name    string
		forward []ebtRuleDef
		user    []ebtChainDef
		hits    []Hit
		verdict int
		marks   *EBTMarks
		want    string
		err     error
	}{
		{name: "policy", verdict: nfDrop, want: "0:FORWARD:end:DROP"},
		{name: "not the policy", verdict: nfAccept, err: ErrNoWalk},
		{name: "rule", forward: []ebtRuleDef{verdictRule(EBTContinue), verdictRule(EBTAccept)}, hits: once(0, 1), verdict: nfAccept,
			want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "behind a verdict", forward: []ebtRuleDef{verdictRule(EBTAccept), verdictRule(EBTContinue)}, hits: once(0, 1), verdict: nfAccept, err: ErrNoWalk},
		{name: "must match", forward: []ebtRuleDef{always(EBTContinue)}, verdict: nfDrop, err: ErrNoWalk},
		{name: "end returns", forward: []ebtRuleDef{jumpTo("U")}, user: []ebtChainDef{{"U", EBTReturn, nil}}, hits: once(0), verdict: nfDrop,
			want: "0:FORWARD:1:jump U 1:U:end:RETURN 0:FORWARD:end:DROP"},
		{name: "end accepts", forward: []ebtRuleDef{jumpTo("U")}, user: []ebtChainDef{{"U", EBTAccept, nil}}, hits: once(0), verdict: nfAccept,
			want: "0:FORWARD:1:jump U 1:U:end:ACCEPT"},
		{name: "rule returns", forward: []ebtRuleDef{jumpTo("U"), verdictRule(EBTAccept)}, user: []ebtChainDef{{"U", EBTDrop, []ebtRuleDef{always(EBTReturn)}}},
			hits: once(0, 1, 2), verdict: nfAccept, want: "0:FORWARD:1:jump U 1:U:1:RETURN 0:FORWARD:2:ACCEPT"},
		{name: "return of a built-in chain goes on", forward: []ebtRuleDef{verdictRule(EBTReturn), verdictRule(EBTAccept)}, hits: once(0, 1), verdict: nfAccept,
			want: "0:FORWARD:1:RETURN 0:FORWARD:2:ACCEPT"},
		{name: "mark", forward: []ebtRuleDef{other("mark", EBTContinue, 0), other("mark", EBTAccept, markOr)}, hits: once(0, 1), verdict: nfAccept,
			want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "snat", forward: []ebtRuleDef{other("snat", EBTContinue, snatARP), other("snat", EBTAccept, snatARP)}, hits: once(0, 1), verdict: nfAccept,
			want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "dnat", forward: []ebtRuleDef{dnat}, hits: once(0), verdict: nfAccept, want: "0:FORWARD:1:ACCEPT"},
		{name: "dnat that could not write", forward: []ebtRuleDef{dnat}, hits: once(0), verdict: nfDrop, want: "0:FORWARD:1:DROP"},
		{name: "a mark is always set", forward: []ebtRuleDef{other("mark", EBTAccept, markOr)}, hits: once(0), verdict: nfDrop, err: ErrNoWalk},
		{name: "a match may not match", forward: []ebtRuleDef{{verdict: EBTAccept, always: true, match: "limit"}}, verdict: nfDrop,
			want: "0:FORWARD:end:DROP"},
		{name: "no ARP request", forward: []ebtRuleDef{reply, verdictRule(EBTAccept)}, hits: once(0, 1), verdict: nfAccept,
			want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "twice", forward: []ebtRuleDef{jumpTo("U"), jumpTo("U")}, user: []ebtChainDef{{"U", EBTReturn, []ebtRuleDef{verdictRule(EBTContinue)}}},
			hits: []Hit{{Index: 0, Packets: 1}, {Index: 1, Packets: 1}, {Index: 2, Packets: 2}}, verdict: nfDrop,
			want: "0:FORWARD:1:jump U 1:U:1:CONTINUE 1:U:end:RETURN 0:FORWARD:2:jump U 1:U:1:CONTINUE 1:U:end:RETURN 0:FORWARD:end:DROP"},
		{name: "once of twice", forward: []ebtRuleDef{jumpTo("U"), jumpTo("U")}, user: []ebtChainDef{{"U", EBTReturn, []ebtRuleDef{verdictRule(EBTContinue)}}},
			hits: once(0, 1, 2), verdict: nfDrop, err: ErrNoWalk},
		{name: "once of twice, a match that varies", forward: twice, user: userChain(varies(EBTContinue)), hits: once(0, 1, 2), verdict: nfDrop, err: ErrAmbiguous},
		{name: "once of twice, an unknown match", forward: twice, user: userChain(ebtRuleDef{verdict: EBTContinue, match: "new"}),
			hits: once(0, 1, 2), verdict: nfDrop, err: ErrAmbiguous},
		{name: "once of twice, an address", forward: twice, user: userChain(ebtRuleDef{verdict: EBTContinue, mac: true}), hits: once(0, 1, 2), verdict: nfDrop, err: ErrNoWalk},
		{name: "once of twice, an address that is rewritten", forward: []ebtRuleDef{jumpTo("U"), other("snat", EBTContinue, snatARP), jumpTo("U")},
			user: userChain(ebtRuleDef{verdict: EBTContinue, mac: true}), hits: once(0, 1, 2, 3), verdict: nfDrop, err: ErrAmbiguous},
		{name: "once of twice, an unknown target between", forward: []ebtRuleDef{jumpTo("U"), {target: "new", data: make([]byte, 8)}, jumpTo("U")},
			user: userChain(ebtRuleDef{verdict: EBTContinue, mac: true}), hits: once(0, 1, 2, 3), verdict: nfDrop, err: ErrAmbiguous},
		// U: with mark 7 it returns, without it gets it.
		{name: "a mark decides", forward: twice, user: userChain(marked(7, 7, false, false, EBTReturn), other("mark", EBTReturn, 0)), marks: &EBTMarks{0, 7},
			hits: once(0, 1, 2, 3), verdict: nfDrop,
			want: "0:FORWARD:1:jump U 1:U:2:RETURN 0:FORWARD:2:jump U 1:U:1:RETURN 0:FORWARD:end:DROP"},
		// Tried in the first visit it leads nowhere, and the mark is as it was.
		{name: "a mark is set in the second visit", forward: []ebtRuleDef{jumpTo("U"), marked(0, 255, false, false, EBTContinue), jumpTo("U")},
			user:  userChain(ebtRuleDef{always: true, match: "limit", target: "mark", data: other("mark", EBTContinue, 0).data}),
			marks: &EBTMarks{0, 7}, hits: once(0, 1, 2, 3), verdict: nfDrop,
			want: "0:FORWARD:1:jump U 1:U:end:RETURN 0:FORWARD:2:CONTINUE 0:FORWARD:3:jump U 1:U:1:CONTINUE 1:U:end:RETURN 0:FORWARD:end:DROP"},
		// It may have set the mark, and have returned or gone on.
		{name: "an unknown target before a mark", forward: []ebtRuleDef{{target: "new", data: make([]byte, 8)}, marked(7, 7, false, false, EBTAccept)},
			marks: &EBTMarks{0, 7}, hits: once(0, 1), verdict: nfAccept, err: ErrAmbiguous},
		{name: "a mark that is not known", forward: twice, user: userChain(marked(7, 7, false, false, EBTReturn), other("mark", EBTReturn, 0)),
			hits: once(0, 1, 2, 3), verdict: nfDrop, err: ErrAmbiguous},
		{name: "a mark that nobody changes", forward: twice, user: userChain(marked(7, 7, false, false, EBTContinue)),
			hits: once(0, 1, 2), verdict: nfDrop, err: ErrNoWalk},
		{name: "a mark is or'ed", forward: []ebtRuleDef{other("mark", EBTContinue, markOr), marked(15, 255, false, false, EBTAccept)}, marks: &EBTMarks{8, 15},
			hits: once(0, 1), verdict: nfAccept, want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "a mark is and'ed", forward: []ebtRuleDef{other("mark", EBTContinue, markAnd), marked(5, 255, false, false, EBTAccept)}, marks: &EBTMarks{13, 5},
			hits: once(0, 1), verdict: nfAccept, want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "a mark is xor'ed", forward: []ebtRuleDef{other("mark", EBTContinue, markXor), marked(10, 255, false, false, EBTAccept)}, marks: &EBTMarks{13, 10},
			hits: once(0, 1), verdict: nfAccept, want: "0:FORWARD:1:CONTINUE 0:FORWARD:2:ACCEPT"},
		{name: "another mark than the packet has", forward: []ebtRuleDef{marked(7, 7, false, false, EBTAccept)}, marks: &EBTMarks{3, 3}, hits: once(0), verdict: nfAccept, err: ErrNoWalk},
		{name: "not that mark", forward: []ebtRuleDef{marked(7, 7, true, false, EBTAccept)}, marks: &EBTMarks{3, 3}, hits: once(0), verdict: nfAccept, want: "0:FORWARD:1:ACCEPT"},
		{name: "a bit of a mark", forward: []ebtRuleDef{marked(0, 6, false, true, EBTAccept)}, marks: &EBTMarks{2, 2}, hits: once(0), verdict: nfAccept, want: "0:FORWARD:1:ACCEPT"},
		{name: "no bit of a mark", forward: []ebtRuleDef{marked(0, 6, false, true, EBTAccept)}, marks: &EBTMarks{9, 9}, hits: once(0), verdict: nfAccept, err: ErrNoWalk},
		{name: "a mark must match", forward: []ebtRuleDef{marked(7, 7, false, false, EBTContinue)}, marks: &EBTMarks{7, 7}, verdict: nfDrop, err: ErrNoWalk},
		{name: "another mark was left", forward: []ebtRuleDef{other("mark", EBTAccept, 0)}, marks: &EBTMarks{0, 8}, hits: once(0), verdict: nfAccept, err: ErrNoWalk},
		{name: "more than there are", hits: once(5), verdict: nfDrop, err: ErrNoWalk},
		{name: "unknown target", forward: []ebtRuleDef{{target: "new", data: make([]byte, 8)}}, hits: once(0), verdict: nfAccept, want: "0:FORWARD:1:ACCEPT"},
		{name: "unknown target, either", forward: []ebtRuleDef{{target: "new", data: make([]byte, 8)}}, hits: once(0), verdict: nfDrop, err: ErrAmbiguous},
		// Half of 24 calls of a chain matched its rule, and no choice of them leads to what the table returned.
		{name: "given up", forward: slices.Repeat([]ebtRuleDef{jumpTo("U")}, 24), user: userChain(varies(EBTContinue)),
			hits: append(once(seq(24)...), Hit{Index: 24, Packets: 12}), verdict: nfAccept, err: ErrAmbiguous},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := filterEBT(t, tt.forward, tt.user...)
			visits, err := table.Walk(2, tt.hits, tt.verdict, tt.marks)
			if !errors.Is(err, tt.err) {
				t.Fatalf("%v, want %v", err, tt.err)
			}
			if got := ebtLines(visits); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	if _, err := filterEBT(t, nil).Walk(EBTBrouting, nil, nfAccept, nil); !errors.Is(err, ErrNoWalk) {
		t.Errorf("table filter at BROUTING: %v", err)
	}
}

// ebtRun runs through a table as ebt_do_table does; match says which rules match a packet of a
// mark. It returns what the mark is then.
func ebtRun(table *EBTTable, chain *EBTChain, mark uint64, match func(r *EBTRule, mark uint64) bool) (visits []EBTVisit, verdict int, left uint64) {
	type back struct {
		chain *EBTChain
		next  int
	}
	var stack []back
	i := 0
	for {
		v := EBTVisit{Chain: chain, Verdict: chain.Policy, Depth: len(stack)}
		if i < len(chain.Rules) {
			r := chain.Rules[i]
			i++
			if !r.Always && !match(r, mark) {
				continue
			}
			v.Rule, v.Verdict = r, 0
			if r.Dest != nil {
				visits = append(visits, v)
				stack = append(stack, back{chain, i})
				chain, i = r.Dest, 0
				continue
			}
			v.Verdict = r.Verdicts[0]
			if r.set != nil {
				mark = r.set.apply(mark)
			}
		}
		visits = append(visits, v)
		switch v.Verdict {
		case EBTAccept:
			return visits, nfAccept, mark
		case EBTDrop:
			return visits, nfDrop, mark
		case EBTReturn:
			if n := len(stack); n > 0 {
				chain, i = stack[n-1].chain, stack[n-1].next
				stack = stack[:n-1]
			}
		}
	}
}

// What a run counted must lead back to that very run, or to none for sure.
func FuzzEBTWalk(f *testing.F) {
	for seed := range int64(50) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed int64) {
		r := rand.New(rand.NewSource(seed))
		chains := []ebtChainDef{{name: "FORWARD", policy: EBTAccept}}
		for i := range r.Intn(5) {
			chains = append(chains, ebtChainDef{name: fmt.Sprintf("U%d", i), policy: []EBTVerdict{EBTReturn, EBTReturn, EBTAccept, EBTDrop}[r.Intn(4)]})
		}
		for i := range chains {
			for range r.Intn(7) {
				v := []EBTVerdict{EBTContinue, EBTContinue, EBTContinue, EBTAccept, EBTDrop, EBTReturn}[r.Intn(6)]
				if i == 0 && v == EBTReturn {
					v = EBTContinue
				}
				var rule ebtRuleDef
				switch r.Intn(5) {
				case 0:
					rule = always(v)
				case 1:
					rule = varies(v)
				case 2:
					rule = marked(uint64(r.Intn(4)), uint64(r.Intn(4)), r.Intn(2) == 0, r.Intn(2) == 0, v)
					rule.always = r.Intn(2) == 0
				default:
					rule = verdictRule(v)
					rule.mac = r.Intn(2) == 0
				}
				switch {
				case i+1 < len(chains) && r.Intn(2) == 0:
					rule.to = chains[i+1+r.Intn(len(chains)-i-1)].name
				case r.Intn(4) == 0:
					rule.target, rule.data = "mark", make([]byte, 16)
					binary.NativeEndian.PutUint64(rule.data, uint64(r.Intn(4)))
					binary.NativeEndian.PutUint32(rule.data[8:], uint32(v)&^(uint32(r.Intn(4))<<4))
				case r.Intn(8) == 0:
					rule.target, rule.data = "snat", make([]byte, 16)
					binary.NativeEndian.PutUint32(rule.data[8:], uint32(v))
				}
				chains[i].rules = append(chains[i].rules, rule)
			}
		}
		info, blob := buildEBT(1<<2, chains)
		table, err := parseEBT("filter", info, blob)
		if err != nil {
			t.Fatal(err)
		}
		// What a rule asks of the packet, its mark aside, has one answer until its addresses change.
		fits := map[*EBTRule]bool{}
		for _, rule := range table.Rules {
			fits[rule] = r.Intn(3) > 0
		}
		rewritten := false
		marks := &EBTMarks{Before: uint32(r.Intn(4))}
		want, verdict, left := ebtRun(table, table.Chains[0], uint64(marks.Before), func(rule *EBTRule, mark uint64) bool {
			for _, m := range rule.conditions.marks {
				if !m.holds(mark) {
					return false
				}
			}
			if c := &rule.conditions; c.varies || c.link && rewritten {
				return r.Intn(2) == 0
			}
			ok := fits[rule] || rule.conditions.onlyMarks
			rewritten = rewritten || ok && rule.Target == "snat"
			return ok
		})
		if marks.Behind = uint32(left); r.Intn(3) == 0 {
			marks = nil
		}
		counts := map[int]uint64{}
		for _, v := range want {
			if v.Rule != nil {
				counts[v.Rule.Index]++
			}
		}
		var hits []Hit
		for i, n := range counts {
			hits = append(hits, Hit{Index: i, Packets: n})
		}
		got, err := table.Walk(2, hits, verdict, marks)
		switch {
		case errors.Is(err, ErrAmbiguous):
		case err != nil:
			t.Fatalf("%v: %s", err, ebtLines(want))
		case !slices.Equal(got, want):
			t.Fatalf("got  %s\nwant %s", ebtLines(got), ebtLines(want))
		}
	})
}

func TestParseEBT(t *testing.T) {
	info, blob := buildEBT(1<<EBTBrouting, []ebtChainDef{
		{"BROUTING", EBTAccept, []ebtRuleDef{jumpTo("U"), always(EBTDrop)}}, {"U", EBTReturn, []ebtRuleDef{verdictRule(EBTReturn)}},
	})
	table, err := parseEBT("broute", info, blob)
	if err != nil {
		t.Fatal(err)
	}
	if c := table.Chains[0]; c.Name != "BROUTING" || c.Hook != EBTBrouting || len(c.Rules) != 2 || c.Rules[0].Dest != table.Chains[1] {
		t.Errorf("%+v", c)
	}
	if c := table.Chains[1]; c.Hook != -1 || c.Rules[0].Index != 2 || c.Rules[0].Num != 1 {
		t.Errorf("%+v", c)
	}
	if got := table.Rules[0].Text(); got != "-p IPv4 -j U" {
		t.Errorf("text %q", got)
	}
	if got := table.Rules[1].Text(); got != "-j DROP" || !table.Rules[1].Always {
		t.Errorf("text %q, always %v", got, table.Rules[1].Always)
	}
	inverted := slices.Clone(blob) // "! -i" without a name, as no program writes it: it matches nothing
	inverted[ebtHeadSize+ebtEntrySize+ebtExtHead+8+4] = ebtInvIn
	if table, err := parseEBT("broute", info, inverted); err != nil || table.Rules[1].Always {
		t.Errorf("a rule that nothing can match is taken for one that all do, %v", err)
	}
	const list = "Bridge table: broute\n\nBridge chain: BROUTING, entries: 2, policy: ACCEPT\n-p IPv4 -j U \n-j DROP\n\nBridge chain: U, entries: 1, policy: RETURN\n-p IPv4 -j RETURN \n"
	texts, err := table.mapTexts([]byte(list))
	if err != nil || !slices.Equal(texts, []string{"-p IPv4 -j U", "-j DROP", "-p IPv4 -j RETURN"}) {
		t.Errorf("%q, %v", texts, err)
	}
	for name, wrong := range map[string]string{
		"a rule fewer":   strings.Replace(list, "-j DROP\n", "", 1),
		"a rule more":    strings.Replace(list, "-j DROP\n", "-j DROP\n-j DROP\n", 1),
		"another target": strings.Replace(list, "-j DROP\n", "-j ACCEPT\n", 1),
		"another chain":  strings.Replace(list, "chain: U,", "chain: V,", 1),
		"a chain fewer":  list[:strings.Index(list, "Bridge chain: U")],
		"nothing":        "",
	} {
		if _, err := table.mapTexts([]byte(wrong)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for name, broken := range map[string]func(*ebtInfo, []byte){
		"size":           func(i *ebtInfo, b []byte) { i.size++ },
		"entries":        func(i *ebtInfo, b []byte) { i.entries++ },
		"hooks":          func(i *ebtInfo, b []byte) { i.validHooks = 0 },
		"more hooks":     func(i *ebtInfo, b []byte) { i.validHooks = 1<<6 - 1 },
		"unknown hooks":  func(i *ebtInfo, b []byte) { i.validHooks = 1 << 6 },
		"counter offset": func(i *ebtInfo, b []byte) { b[36]++ },
		"rules of chain": func(i *ebtInfo, b []byte) { b[44]++ },
		"policy":         func(i *ebtInfo, b []byte) { b[40] -= 2 },
		"next offset":    func(i *ebtInfo, b []byte) { b[ebtHeadSize+108] = 1 },
		"verdict": func(i *ebtInfo, b []byte) {
			binary.NativeEndian.PutUint32(b[ebtHeadSize+ebtEntrySize+ebtExtHead:], ^uint32(4))
		},
	} {
		i, b := info, slices.Clone(blob)
		broken(&i, b)
		if _, err := parseEBT("broute", i, b); !errors.Is(err, ErrBlob) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestEBTInverted: of what every rule can ask, that is inverted which the kernel's bit is of
// (include/uapi/linux/netfilter_bridge/ebtables.h: EBT_IPROTO, EBT_IIN, …).
func TestEBTInverted(t *testing.T) {
	text := func(inv uint32) string {
		info, blob := buildEBT(1<<2, []ebtChainDef{{"FORWARD", EBTAccept, []ebtRuleDef{{verdict: EBTDrop, mac: true}}}})
		b := blob[ebtHeadSize:]
		b[0] |= ebtFlagDst
		binary.NativeEndian.PutUint32(b[4:], inv)
		copy(b[10:], "eth0")
		copy(b[26:], "br0")
		copy(b[42:], "eth1")
		copy(b[58:], "br1")
		for i := 74; i < 98; i++ {
			b[i] = 255
		}
		table, err := parseEBT("filter", info, blob)
		if err != nil {
			t.Fatal(err)
		}
		return table.Rules[0].Text()
	}
	plain := text(0)
	for inv, option := range map[uint32]string{
		0x01: "-p", 0x02: "-i", 0x04: "-o", 0x08: "-s", 0x10: "-d", 0x20: "--logical-in", 0x40: "--logical-out",
	} {
		want := strings.Replace(plain, option+" ", option+" ! ", 1)
		if got := text(inv); got != want || got == plain {
			t.Errorf("%#x: %q, want %q", inv, got, want)
		}
	}
}

// TestEBTExtensionText: nftrace's own words for extensions say what they ask and do, and what is inverted.
func TestEBTExtensionText(t *testing.T) {
	ip := func(bitmask, not byte) ebtRuleDef {
		ask := []byte{10, 0, 0, 1, 10, 0, 0, 2, 255, 255, 255, 255, 255, 255, 255, 0, 0x10, 6, bitmask, not, 0, 0, 0, 0, 0, 0, 0, 0}
		return ebtRuleDef{verdict: EBTDrop, always: true, match: "ip", ask: ask}
	}
	nat := func(target string, v uint32) ebtRuleDef {
		data := []byte{2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		binary.NativeEndian.PutUint32(data[8:], v)
		return ebtRuleDef{always: true, target: target, data: data}
	}
	for _, tt := range []struct {
		rule ebtRuleDef
		want string
	}{
		{ip(7, 0), "--ip-src 10.0.0.1 --ip-dst 10.0.0.2/255.255.255.0 --ip-tos 0x10 -j DROP"},
		{ip(7, 1), "--ip-src ! 10.0.0.1 --ip-dst 10.0.0.2/255.255.255.0 --ip-tos 0x10 -j DROP"},
		{ip(7, 2), "--ip-src 10.0.0.1 --ip-dst ! 10.0.0.2/255.255.255.0 --ip-tos 0x10 -j DROP"},
		{ip(7, 4), "--ip-src 10.0.0.1 --ip-dst 10.0.0.2/255.255.255.0 --ip-tos ! 0x10 -j DROP"},
		{ip(15, 8), "--ip … -j DROP"},
		{marked(7, 255, false, false, EBTDrop), "--mark 0x7/0xff -j DROP"},
		{marked(7, 255, true, false, EBTDrop), "--mark ! 0x7/0xff -j DROP"},
		{marked(7, 255, true, true, EBTDrop), "--mark_m … -j DROP"},
		{nat("snat", 0xffffffff), "-j snat --to-src 02:00:00:00:00:01 --snat-target ACCEPT"},
		{nat("snat", 0xffffffed), "-j snat --to-src 02:00:00:00:00:01 --snat-arp --snat-target CONTINUE"},
		{nat("dnat", 0xfffffffd), "-j dnat --to-dst 02:00:00:00:00:01 --dnat-target CONTINUE"},
	} {
		if got := filterEBT(t, []ebtRuleDef{tt.rule}).Rules[0].Text(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// Whatever is not a table is refused, and what is taken is whole.
func FuzzParseEBT(f *testing.F) {
	info, blob := buildEBT(1<<2, []ebtChainDef{{"FORWARD", EBTAccept, []ebtRuleDef{jumpTo("U"), always(EBTDrop)}}, {"U", EBTReturn, nil}})
	f.Add(info.validHooks, info.entries, blob)
	f.Fuzz(func(t *testing.T, hooks, entries uint32, blob []byte) {
		table, err := parseEBT("filter", ebtInfo{hooks, entries, uint32(len(blob))}, blob)
		if err != nil {
			if !errors.Is(err, ErrBlob) {
				t.Fatal(err)
			}
			return
		}
		n := 0
		for _, c := range table.Chains {
			for i, r := range c.Rules {
				if r.Index != n || r.Num != i+1 || r.Chain != c || table.Rules[n] != r || strings.ContainsAny(r.Text(), "\n\r") {
					t.Fatalf("rule %d: %+v", n, r)
				}
				n++
			}
		}
		if n != int(entries) {
			t.Fatalf("%d rules of %d", n, entries)
		}
		table.Walk(2, once(0), nfAccept, &EBTMarks{})
		table.mapTexts(blob)
	})
}
