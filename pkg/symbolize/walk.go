package symbolize

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sort"
)

// Hit is one rule counter that grew during one run of a table.
type Hit struct {
	Index   int    // of the entry in Table.Entries
	Packets uint64 // by how much the packet counter grew
	Bytes   uint64 // by how much the byte counter grew; Walk does not look at it
}

// Netfilter verdicts (include/uapi/linux/netfilter.h).
const (
	nfDrop   = 0
	nfAccept = 1
	nfStolen = 2
	nfQueue  = 3
	nfRepeat = 4
	nfStop   = 5

	nfVerdictMask = 0xff // the rest is NF_QUEUE's queue or NF_DROP's errno
)

// Visit is one entry that a run visited and whose matches passed: one line
// that TRACE would log.
type Visit struct {
	Index int
	Chain string
	Type  string // "rule", "return" or "policy", as TRACE prints it
	Num   int
	// Depth is the number of jumps and gotos that lead from the built-in chain
	// to here.
	Depth int
	// Action is "ACCEPT", "DROP", "QUEUE", "RETURN", "jump CHAIN", "goto CHAIN",
	// "continue", or the name of the target extension that ended the run.
	Action          string
	IsPolicy, IsEnd bool
}

// Path is what a run did, in order.
type Path struct {
	Visits []Visit
	// Hotdrop is empty unless a match, not a target, ended the run with DROP (it
	// found the packet malformed or could not do its work); it then says, in
	// words, which rules it can have been.
	Hotdrop string
}

// Causes of Walk's errors, for errors.Is; the error's text has the cause in words.
var (
	// ErrNoWalk: the counters cannot have grown so in one run of this table
	// with this verdict.
	ErrNoWalk = errors.New("no path through the table fits the counters")
	// ErrAmbiguous: more than one path fits, or too many had to be tried.
	ErrAmbiguous = errors.New("more than one path through the table fits the counters")
)

const (
	// maxVisits bounds a run. Rulesets have no loops, so real runs are far below.
	maxVisits = 1 << 14
	// maxTries bounds the search, in visits tried.
	maxTries = 1 << 16
)

// Walk finds the order in which one run of the table at hook visited the
// entries in hits, given the verdict that ipt_do_table returned. It mirrors
// net/ipv4/netfilter/ip_tables.c:ipt_do_table (ip6_tables.c likewise): every
// hit must be used up, the end must fit the verdict, and no entry that
// matches every packet is passed over. Where a chain was entered more than
// once the hits alone may allow several orders; rules whose conditions
// cannot change during a run then decide, and if more than one order is
// left the error is ErrAmbiguous.
//
// accept may be nil; otherwise it says whether the packet passes an entry's
// own conditions (Table.Plausible), and a hit that it refuses is an ErrNoWalk.
//
// An extension target that the last visit ran and that may have ended the
// run is taken to have ended it, but for one that drops only what it cannot change:
// where a later rule's match may have dropped the packet the error is ErrAmbiguous, too.
func (t *Table) Walk(hook int, hits []Hit, verdict int, accept func(entry int) bool) (*Path, error) {
	if hook < 0 || hook >= NumHooks || t.HookEntry[hook] < 0 || t.Underflow[hook] < 0 {
		return nil, fmt.Errorf("%w: %v table %q has no hook %d", ErrNoWalk, t.Family, t.Name, hook)
	}
	w, err := newWalker(t, hook, hits, verdict, accept)
	if err != nil {
		return nil, err
	}
	w.from(t.HookEntry[hook], nil, 0)
	switch {
	case len(w.found) > 1:
		return nil, fmt.Errorf("%w: %s", ErrAmbiguous, w.difference())
	case w.tries >= maxTries:
		return nil, fmt.Errorf("%w: gave up after trying %d visits", ErrAmbiguous, maxTries)
	case len(w.found) == 0:
		return nil, fmt.Errorf("%w: %s", ErrNoWalk, w.why)
	}
	return w.path(w.found[0]), nil
}

type frame struct {
	entry  int // the jump; a RETURN goes on behind it
	depth  int // Depth where the jump was
	caller *frame
}

// found is one complete sequence.
type found struct {
	seq     []step
	hotdrop string
}

type step struct {
	hit   int // index into walker.hits
	depth int
}

type whit struct {
	index  int
	rem    uint64 // visits not yet made
	sticky bool   // matched once, so it matches whenever it is looked at
}

type walker struct {
	t       *Table
	hook    int
	verdict uint32
	accept  func(int) bool

	hits    []whit   // by index
	left    uint64   // sum of rem
	entries []uint64 // per stretch: jumps and gotos into it that are left
	seq     []step
	found   []found
	tries   int

	deepest int // longest seq that came to a dead end, and why it did
	why     string
}

func newWalker(t *Table, hook int, hits []Hit, verdict int, accept func(int) bool) (*walker, error) {
	w := &walker{t: t, hook: hook, verdict: uint32(verdict) & nfVerdictMask, accept: accept, deepest: -1}
	w.hits = make([]whit, 0, len(hits))
	for _, h := range hits {
		if h.Packets == 0 {
			continue
		}
		if h.Index < 0 || h.Index >= len(t.Entries) {
			return nil, fmt.Errorf("%w: entry %d of %d", ErrNoWalk, h.Index, len(t.Entries))
		}
		if h.Packets > maxVisits || w.left+h.Packets > maxVisits {
			return nil, fmt.Errorf("%w: more than %d visits", ErrNoWalk, maxVisits)
		}
		if accept != nil && !accept(h.Index) {
			return nil, fmt.Errorf("%w: the packet does not fit the conditions of %s", ErrNoWalk, w.name(h.Index))
		}
		w.left += h.Packets
		w.hits = append(w.hits, whit{index: h.Index, rem: h.Packets})
	}
	byIndex := func(a, b whit) int { return cmp.Compare(a.index, b.index) }
	if !slices.IsSortedFunc(w.hits, byIndex) {
		slices.SortFunc(w.hits, byIndex)
	}
	n := 0
	for i := range w.hits { // one per entry
		if n > 0 && w.hits[n-1].index == w.hits[i].index {
			w.hits[n-1].rem += w.hits[i].rem
			continue
		}
		w.hits[n] = w.hits[i]
		n++
	}
	w.hits = w.hits[:n]

	w.entries = make([]uint64, t.segs)
	s := newStability(t, w.hits)
	for i := range w.hits {
		h := &w.hits[i]
		e := &t.Entries[h.index]
		h.sticky = e.always || s.sticky(e)
		if e.Kind == TargetJump || e.Kind == TargetGoto {
			w.entries[t.Entries[e.Dest].seg] += h.rem
		}
	}
	return w, nil
}

// from tries every way to go on at entry p with all hits that are left.
func (w *walker) from(p int, stack *frame, depth int) {
	if w.left == 0 {
		w.endByMatch(p)
		return
	}
	if p >= len(w.t.Entries) {
		w.dead("the path leaves the table with %d visits to make", w.left)
		return
	}
	// The next entry that matches every packet cannot be passed over.
	bound := int(w.t.nextAlways[p])
	k := sort.Search(len(w.hits), func(i int) bool { return w.hits[i].index >= p })
	for ; k < len(w.hits) && w.hits[k].index <= bound; k++ {
		h := &w.hits[k]
		if h.rem == 0 {
			if h.sticky {
				break
			}
			continue
		}
		w.visit(k, stack, depth)
		if len(w.found) > 1 || w.tries >= maxTries {
			return
		}
		// Pass over h: only if it need not match, and if its chain is entered
		// often enough afterwards to visit it as often as it must be.
		if h.sticky || h.rem > w.entries[w.t.Entries[h.index].seg] {
			return
		}
	}
	switch {
	case !w.farthest(): // names are not wanted
	case bound < len(w.t.Entries):
		w.dead("%s, which every packet matches, would be passed over", w.name(bound))
	default:
		w.dead("no rule that matched follows %s", w.name(p))
	}
}

// visit lets hit k match and follows its target.
func (w *walker) visit(k int, stack *frame, depth int) {
	if w.tries++; w.tries >= maxTries {
		return
	}
	h := &w.hits[k]
	e := &w.t.Entries[h.index]
	h.rem--
	w.left--
	w.seq = append(w.seq, step{k, depth})
	defer func() {
		h.rem++
		w.left++
		w.seq = w.seq[:len(w.seq)-1]
	}()

	if w.left == 0 && w.verdict == nfDrop && hotdropWhileMatching(e) && !w.ends(e) {
		later := " or of a later rule"
		if e.Kind == TargetVerdict {
			later = ""
		}
		w.finish(fmt.Sprintf("a match of %s%s dropped the packet as malformed (hotdrop)", w.name(h.index), later))
		return
	}
	switch e.Kind {
	case TargetVerdict:
		switch {
		case w.left > 0:
			if w.farthest() {
				w.dead("%s ends the run, but %d visits are left to make", w.name(h.index), w.left)
			}
		case uint32(e.Verdict)&nfVerdictMask != w.verdict:
			w.dead("%s ends the run with %s, but it ended with %s", w.name(h.index),
				verdictName(uint32(e.Verdict)), verdictName(w.verdict))
		default:
			w.finish("")
		}
	case TargetReturn:
		if stack == nil {
			w.from(w.t.Underflow[w.hook], nil, 0)
		} else {
			w.from(stack.entry+1, stack.caller, stack.depth)
		}
	case TargetNext:
		w.from(h.index+1, stack, depth)
	case TargetGoto, TargetJump:
		seg := w.t.Entries[e.Dest].seg
		w.entries[seg]--
		if e.Kind == TargetJump {
			stack = &frame{entry: h.index, depth: depth, caller: stack}
		}
		w.from(e.Dest, stack, depth+1)
		w.entries[seg]++
	default: // an extension, or ERROR, which drops
		ends := endsOf(e)
		switch {
		case w.left == 0 && ends == endsFailing && w.verdict == nfDrop:
			// It rarely fails: a later rule's match may as well have dropped the packet.
			w.finish("")
			w.from(h.index+1, stack, depth)
		case w.left == 0 && (ends == endsAlways || ends == endsMaybe):
			w.finish("")
		case ends == endsAlways:
			if w.left > 0 && w.farthest() {
				w.dead("%s ends the run, but %d visits are left to make", w.name(h.index), w.left)
			}
		default:
			w.from(h.index+1, stack, depth)
		}
	}
}

// ends reports that e's target itself gives the run's verdict.
func (w *walker) ends(e *Entry) bool {
	switch e.Kind {
	case TargetVerdict:
		return uint32(e.Verdict)&nfVerdictMask == w.verdict
	case TargetExtension, TargetError:
		return endsOf(e) != endsNever
	}
	return false
}

// endByMatch is the end of a run after which no more counters grew: only a
// match that set hotdrop can have ended it, in a rule from p on.
func (w *walker) endByMatch(p int) {
	if w.verdict != nfDrop {
		w.dead("no rule gave the verdict %s", verdictName(w.verdict))
		return
	}
	bound := len(w.t.Entries)
	if p < bound {
		bound = int(w.t.nextAlways[p])
	}
	k := sort.Search(len(w.hits), func(i int) bool { return w.hits[i].index >= p })
	first, n := -1, 0
	for i := p; i < bound; i++ {
		e := &w.t.Entries[i]
		// A match before the one that would have failed can have set hotdrop,
		// so even a rule that matched earlier in the run can be it.
		for k < len(w.hits) && w.hits[k].index < i {
			k++
		}
		if k < len(w.hits) && w.hits[k].index == i && w.hits[k].sticky {
			break
		}
		if canHotdrop(w.t.Family, e) && (w.accept == nil || w.accept(i)) {
			if n == 0 {
				first = i
			}
			n++
		}
	}
	switch n {
	case 0:
		w.dead("no rule gave the verdict DROP")
	case 1:
		w.finish(fmt.Sprintf("a match of %s dropped the packet as malformed (hotdrop)", w.name(first)))
	default:
		w.finish(fmt.Sprintf("a match of %s or of a later rule of the chain dropped the packet as malformed (hotdrop)",
			w.name(first)))
	}
}

func (w *walker) finish(hotdrop string) {
	w.found = append(w.found, found{seq: append([]step(nil), w.seq...), hotdrop: hotdrop})
}

// farthest reports that dead will take note: nobody asks where a path was found.
func (w *walker) farthest() bool { return len(w.found) == 0 && len(w.seq) > w.deepest }

// dead notes why the path that got farthest could not go on.
func (w *walker) dead(format string, args ...any) {
	if w.farthest() {
		w.deepest = len(w.seq)
		w.why = fmt.Sprintf(format, args...)
	}
}

// difference says where the two sequences found part.
func (w *walker) difference() string {
	a, b := w.found[0].seq, w.found[1].seq
	for i := range min(len(a), len(b)) {
		if a[i].hit == b[i].hit {
			continue
		}
		at := "at the start"
		if i > 0 {
			at = "after " + w.name(w.hits[a[i-1].hit].index)
		}
		return fmt.Sprintf("%s either %s or %s came next (the chain was entered more than once)",
			at, w.name(w.hits[a[i].hit].index), w.name(w.hits[b[i].hit].index))
	}
	for i, end := range w.found {
		if end.hotdrop != "" {
			last := w.found[1-i].seq
			return fmt.Sprintf("%s, or the target of %s could not change it", end.hotdrop, w.name(w.hits[last[len(last)-1].hit].index))
		}
	}
	return "the paths differ in their ends"
}

func (w *walker) name(i int) string {
	if i >= len(w.t.Entries) {
		return "the end of the table"
	}
	chain, _, num := w.t.TraceName(w.hook, i)
	return fmt.Sprintf("%s:%d", chain, num)
}

func (w *walker) path(f found) *Path {
	p := &Path{Hotdrop: f.hotdrop, Visits: make([]Visit, len(f.seq))}
	for n, s := range f.seq {
		i := w.hits[s.hit].index
		e := &w.t.Entries[i]
		v := Visit{Index: i, Depth: s.depth, IsPolicy: e.IsPolicy, IsEnd: e.IsEnd}
		v.Chain, v.Type, v.Num = w.t.TraceName(w.hook, i)
		v.Action = w.t.action(e, n == len(f.seq)-1 && f.hotdrop == "")
		p.Visits[n] = v
	}
	return p
}

// action says what e's target did; last is set where the run ended with it.
func (t *Table) action(e *Entry, last bool) string {
	switch e.Kind {
	case TargetVerdict:
		return verdictName(uint32(e.Verdict))
	case TargetReturn:
		return "RETURN"
	case TargetJump:
		return "jump " + t.Entries[e.Dest].Chain
	case TargetGoto:
		return "goto " + t.Entries[e.Dest].Chain
	case TargetExtension, TargetError:
		if last {
			return e.Target
		}
	}
	return "continue"
}

func verdictName(v uint32) string {
	switch v & nfVerdictMask {
	case nfDrop:
		return "DROP"
	case nfAccept:
		return "ACCEPT"
	case nfStolen:
		return "STOLEN"
	case nfQueue:
		return "QUEUE"
	case nfRepeat:
		return "REPEAT"
	case nfStop:
		return "STOP"
	}
	return fmt.Sprintf("verdict %d", v&nfVerdictMask)
}
