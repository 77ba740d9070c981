package symbolize

import "fmt"

// EBTVisit is a rule that matched, or what a chain's policy did at its end.
type EBTVisit struct {
	Chain *EBTChain
	Rule  *EBTRule // nil for the end of the chain
	// Verdict is what was decided; for a rule that jumps it is 0.
	Verdict EBTVerdict
	Depth   int // the number of jumps that lead here
}

// Walk finds the order in which one run of the table at hook (NF_BR_*) matched rules, given how
// often each did and what ebt_do_table returned (NF_ACCEPT or NF_DROP). It mirrors
// net/bridge/netfilter/ebtables.c:ebt_do_table. Where a chain was entered more than once, what
// cannot have changed within the run decides, and the packet's marks, if they are known (else nil).
// The errors are ErrNoWalk and ErrAmbiguous.
func (t *EBTTable) Walk(hook int, hits []Hit, verdict int, marks *EBTMarks) ([]EBTVisit, error) {
	w := ebtWalker{t: t, left: make([]uint64, len(t.Rules)), drop: verdict == nfDrop, marks: marks}
	total := uint64(0)
	for _, h := range hits {
		if h.Index < 0 || h.Index >= len(t.Rules) {
			return nil, fmt.Errorf("%w: rule %d of %d", ErrNoWalk, h.Index+1, len(t.Rules))
		}
		if h.Packets > maxVisits || total+h.Packets > maxVisits {
			return nil, fmt.Errorf("%w: more than %d visits", ErrNoWalk, maxVisits)
		}
		w.left[h.Index] += h.Packets
		total += h.Packets
	}
	w.total = total
	w.enters = map[*EBTChain]uint64{}
	w.matched = make([]bool, len(t.Rules))
	for i, n := range w.left {
		r := t.Rules[i]
		if r.Dest != nil {
			w.enters[r.Dest] += n
		}
		if w.matched[i] = n > 0; n > 0 {
			w.changes(r)
		}
	}
	if marks != nil {
		w.mark = uint64(marks.Before)
	}
	for _, c := range t.Chains {
		if c.Hook == hook {
			w.run(c, 0, nil)
			switch {
			case len(w.found) > 1:
				return nil, ErrAmbiguous
			case w.tries >= maxTries:
				return nil, fmt.Errorf("%w: gave up after trying %d rules", ErrAmbiguous, maxTries)
			case len(w.found) == 0:
				return nil, ErrNoWalk
			}
			return w.found[0], nil
		}
	}
	return nil, fmt.Errorf("%w: table %q has no chain %d", ErrNoWalk, t.Name, hook)
}

type ebtWalker struct {
	t      *EBTTable
	left   []uint64 // matches of each rule that are not yet accounted for
	total  uint64   // sum of left
	enters map[*EBTChain]uint64
	drop   bool
	seq    []EBTVisit
	found  [][]EBTVisit
	tries  int

	matched          []bool // of each rule: it did, once or more
	newLink, newMark bool   // a rule that matched may have changed what others ask
	marks            *EBTMarks
	mark             uint64 // what it is now, if marks are known
}

// changes takes note of what a rule that matched changes.
func (w *ebtWalker) changes(r *EBTRule) {
	switch {
	case r.Target == ebtStandard || r.Target == "arpreply":
	case r.set != nil:
		w.newMark = true
	case r.Target == "dnat" || r.Target == "snat" || r.Target == "redirect":
		w.newLink = true
	default:
		w.newLink, w.newMark, w.marks = true, true, nil
	}
}

// asks tells whether a rule can match now, and whether it cannot but match.
func (w *ebtWalker) asks(r *EBTRule) (can, must bool) {
	c := &r.conditions
	can = w.matched[r.Index]
	if w.marks != nil {
		for i := range c.marks {
			if !c.marks[i].holds(w.mark) {
				return false, false
			}
		}
	}
	marksHold := len(c.marks) == 0 || w.marks != nil
	switch {
	case r.Always || marksHold && c.onlyMarks:
		must = true
	case can && !c.varies && !(c.link && w.newLink):
		// It has matched, and whatever it asks has the same answer here.
		must = marksHold || !w.newMark
	}
	return can, must
}

// ebtFrame is where a chain was jumped from.
type ebtFrame struct {
	chain  *EBTChain
	next   int // index of the rule to go on with
	caller *ebtFrame
}

// run goes on in chain c at rule i.
func (w *ebtWalker) run(c *EBTChain, i int, stack *ebtFrame) {
	depth := 0
	for f := stack; f != nil; f = f.caller {
		depth++
	}
	for ; ; i++ {
		if w.tries++; w.tries >= maxTries || len(w.found) > 1 {
			return
		}
		if i == len(c.Rules) {
			w.visit(EBTVisit{Chain: c, Verdict: c.Policy, Depth: depth}, c, i, stack)
			return
		}
		r := c.Rules[i]
		can, must := w.asks(r)
		if can && w.left[r.Index] > 0 {
			w.left[r.Index]--
			w.total--
			w.match(r, depth, i, stack)
			w.left[r.Index]++
			w.total++
		}
		// Else it is one of its chain's later runs that matched.
		if must || w.left[r.Index] > w.enters[c] {
			return
		}
	}
}

// match goes on where rule r matched, the one before index i+1 of its chain.
func (w *ebtWalker) match(r *EBTRule, depth, i int, stack *ebtFrame) {
	if r.set != nil {
		before := w.mark
		w.mark = r.set.apply(before)
		defer func() { w.mark = before }()
	}
	if to := r.Dest; to != nil {
		w.enters[to]--
		w.seq = append(w.seq, EBTVisit{Chain: r.Chain, Rule: r, Depth: depth})
		w.run(to, 0, &ebtFrame{r.Chain, i + 1, stack})
		w.seq = w.seq[:len(w.seq)-1]
		w.enters[to]++
		return
	}
	verdicts := r.Verdicts
	if len(verdicts) == 0 {
		verdicts = []EBTVerdict{EBTAccept, EBTDrop, EBTContinue, EBTReturn}
	}
	for _, v := range verdicts {
		w.visit(EBTVisit{Chain: r.Chain, Rule: r, Verdict: v, Depth: depth}, r.Chain, i+1, stack)
	}
}

// visit takes a visit and goes on behind it; next is the rule behind it in chain c.
func (w *ebtWalker) visit(v EBTVisit, c *EBTChain, next int, stack *ebtFrame) {
	w.seq = append(w.seq, v)
	defer func() { w.seq = w.seq[:len(w.seq)-1] }()
	switch v.Verdict {
	case EBTAccept, EBTDrop:
		if w.total == 0 && (v.Verdict == EBTDrop) == w.drop && (w.marks == nil || w.mark == uint64(w.marks.Behind)) {
			w.found = append(w.found, append([]EBTVisit(nil), w.seq...))
		}
	case EBTReturn:
		if stack != nil {
			w.run(stack.chain, stack.next, stack.caller)
		} else if v.Rule != nil {
			w.run(c, next, nil) // the kernel warns, and goes on
		}
	default:
		w.run(c, next, stack)
	}
}
