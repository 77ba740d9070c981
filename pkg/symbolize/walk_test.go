package symbolize

import (
	"errors"
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"
)

const (
	prerouting = iota
	input
	forward
	output
	postrouting
)

func once(idx ...int) []Hit {
	var hits []Hit
	for _, i := range idx {
		hits = append(hits, Hit{Index: i, Packets: 1, Bytes: 84})
	}
	return hits
}

func lines(p *Path) []string {
	var s []string
	for _, v := range p.Visits {
		s = append(s, v.String()+" "+v.Action)
	}
	return s
}

func wantLines(t *testing.T, p *Path, err error, want ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if got := lines(p); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestWalkDocker is scenario S1's request as TRACE logged it.
func TestWalkDocker(t *testing.T) {
	f := loadFixture(t, "docker.v4.filter")
	var hits []Hit
	for _, at2 := range []struct {
		chain string
		num   int
	}{
		{"FORWARD", 1}, {"FORWARD", 2}, {"FORWARD", 4}, {"FORWARD", 6},
		{"DOCKER", 2}, {"DOCKER-ISOLATION-STAGE-1", 2}, {"DOCKER-USER", 1},
	} {
		hits = append(hits, Hit{Index: at(t, f.table, at2.chain, at2.num), Packets: 1, Bytes: 84})
	}
	p, err := f.table.Walk(forward, hits, nfAccept, nil)
	wantLines(t, p, err,
		"FORWARD:rule:1 jump DOCKER-USER",
		"DOCKER-USER:return:1 RETURN",
		"FORWARD:rule:2 jump DOCKER-ISOLATION-STAGE-1",
		"DOCKER-ISOLATION-STAGE-1:return:2 RETURN",
		"FORWARD:rule:4 jump DOCKER",
		"DOCKER:return:2 RETURN",
		"FORWARD:rule:6 ACCEPT")
	if v := p.Visits[5]; !v.IsEnd || v.IsPolicy || v.Depth != 1 {
		t.Errorf("end of DOCKER: %+v", v)
	}
	if v := p.Visits[3]; v.IsEnd {
		t.Errorf("an explicit RETURN is no end: %+v", v)
	}
	if _, err := f.table.Walk(forward, hits, nfDrop, nil); !errors.Is(err, ErrNoWalk) {
		t.Errorf("wrong verdict: %v", err)
	}
	if _, err := f.table.Walk(input, hits, nfAccept, nil); !errors.Is(err, ErrNoWalk) {
		t.Errorf("wrong hook: %v", err)
	}
	if _, err := f.table.Walk(prerouting, hits, nfAccept, nil); !errors.Is(err, ErrNoWalk) {
		t.Errorf("no such hook: %v", err)
	}
	for i := range hits {
		less := slices.Delete(slices.Clone(hits), i, i+1)
		if p, err := f.table.Walk(forward, less, nfAccept, nil); !errors.Is(err, ErrNoWalk) {
			t.Errorf("without hit %d: %v %v", i, p, err)
		}
	}
	refuse := hits[3].Index
	_, err = f.table.Walk(forward, hits, nfAccept, func(i int) bool { return i != refuse })
	if !errors.Is(err, ErrNoWalk) {
		t.Errorf("refused by accept: %v", err)
	}
}

func TestWalk(t *testing.T) {
	type want struct {
		lines   []string
		hotdrop string // part of Path.Hotdrop
		err     error
		cause   string // part of the error
	}
	type visit struct {
		chain string
		num   int
		n     uint64
	}
	tests := []struct {
		name    string
		chains  []chain
		hits    []visit
		verdict int
		want    want
	}{
		{
			name:    "policy",
			chains:  []chain{{name: "INPUT", policy: "DROP"}},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: 0xffff0000 | nfDrop,
			want:    want{lines: []string{"INPUT:policy:1 DROP"}},
		},
		{
			name: "an unconditional verdict prints policy in a built-in chain, return in a user chain",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {target: "ACCEPT"}}},
				{name: "FORWARD", policy: "DROP"},
				{name: "U", rules: []rule{{match: []string{"mark"}, target: "DROP"}, {src: "10", target: "RETURN"}, {target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"U", 3, 1}},
			verdict: nfAccept,
			want:    want{lines: []string{"INPUT:rule:1 jump U", "U:return:3 ACCEPT"}},
		},
		{
			name: "unconditional ACCEPT in the built-in chain",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{match: []string{"mark"}, target: "ACCEPT"}, {target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 2, 1}},
			verdict: nfAccept,
			want:    want{lines: []string{"INPUT:policy:2 ACCEPT"}},
		},
		{
			name: "a conditional RETURN prints rule",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}}},
				{name: "U", rules: []rule{{src: "10", target: "RETURN"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"U", 1, 1}, {"INPUT", 2, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 jump U", "U:rule:1 RETURN", "INPUT:policy:2 DROP"}},
		},
		{
			name: "RETURN from the built-in chain leads to the policy",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{src: "10", target: "RETURN"}, {target: "DROP"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 3, 1}},
			verdict: nfAccept,
			want:    want{lines: []string{"INPUT:rule:1 RETURN", "INPUT:policy:3 ACCEPT"}},
		},
		{
			name: "unconditional RETURN from the built-in chain prints policy",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "RETURN"}, {target: "DROP"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 3, 1}},
			verdict: nfAccept,
			want:    want{lines: []string{"INPUT:policy:1 RETURN", "INPUT:policy:3 ACCEPT"}},
		},
		{
			name: "goto from the built-in chain, then the end: policy",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "goto G"}, {target: "ACCEPT"}}},
				{name: "G"},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"G", 1, 1}, {"INPUT", 3, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 goto G", "G:return:1 RETURN", "INPUT:policy:3 DROP"}},
		},
		{
			name: "return from a goto'd chain goes to the caller's caller",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump J"}, {target: "ACCEPT"}}},
				{name: "G"},
				{name: "J", rules: []rule{{src: "10", target: "goto G"}, {target: "DROP"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"G", 1, 1}, {"J", 1, 1}, {"INPUT", 2, 1}},
			verdict: nfAccept,
			want: want{lines: []string{"INPUT:rule:1 jump J", "J:rule:1 goto G", "G:return:1 RETURN",
				"INPUT:policy:2 ACCEPT"}},
		},
		{
			name: "a rule without target, and an extension that continues",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{src: "10"}, {target: "LOG"}, {match: []string{"limit"}, target: "MARK"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"INPUT", 4, 1}},
			verdict: nfDrop,
			want: want{lines: []string{"INPUT:rule:1 continue", "INPUT:rule:2 continue", "INPUT:rule:3 continue",
				"INPUT:policy:4 DROP"}},
		},
		{
			name: "an extension that ends the run",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{src: "10", target: "MARK"}, {target: "REJECT"}, {target: "LOG"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 continue", "INPUT:rule:2 REJECT"}},
		},
		{
			name: "NF_QUEUE carries the queue's number",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{src: "10", target: "NFQUEUE"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: 7<<16 | 0x8000 | nfQueue,
			want:    want{lines: []string{"INPUT:rule:1 NFQUEUE"}},
		},
		{
			name: "the standard QUEUE",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{src: "10", target: "QUEUE"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfQueue,
			want:    want{lines: []string{"INPUT:rule:1 QUEUE"}},
		},
		{
			name: "an unknown extension may end or continue",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{src: "10", target: "XYZZY"}, {src: "10", target: "XYZZY"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}},
			verdict: nfStolen,
			want:    want{lines: []string{"INPUT:rule:1 continue", "INPUT:rule:2 XYZZY"}},
		},
		{
			name: "hotdrop before anything matched",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{match: []string{"mark"}, target: "DROP"}, {match: []string{"tcp"}, target: "ACCEPT"}}},
			},
			verdict: nfDrop,
			want:    want{hotdrop: "a match of INPUT:2 dropped the packet as malformed"},
		},
		{
			name: "hotdrop after LOG",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "LOG"}, {match: []string{"tcp"}, target: "ACCEPT"}, {match: []string{"udp"}}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 continue"}, hotdrop: "INPUT:2 or of a later rule"},
		},
		{
			name: "hotdrop after TTL, or TTL could not change the packet",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "TTL"}, {match: []string{"tcp"}, target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{err: ErrAmbiguous, cause: "a match of INPUT:2 dropped the packet as malformed (hotdrop), or the target of INPUT:1 could not change it"},
		},
		{
			name: "nothing but TTL can have dropped it",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "TTL"}, {match: []string{"mark"}, target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 TTL"}},
		},
		{
			name: "TTL does not accept",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "TTL"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfAccept,
			want:    want{err: ErrNoWalk, cause: "ACCEPT"},
		},
		{
			name: "hotdrop in a user chain",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "jump U"}}},
				{name: "U", rules: []rule{{match: []string{"hashlimit"}, target: "DROP"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 jump U"}, hotdrop: "U:1"},
		},
		{
			name: "hotdrop of a match that matched or of a later one",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{match: []string{"recent"}}, {match: []string{"tcp"}, target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 continue"}, hotdrop: "a match of INPUT:1 or of a later rule"},
		},
		{
			name: "no hotdrop where no match can",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "LOG"}, {match: []string{"mark"}, target: "DROP"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{err: ErrNoWalk, cause: "no rule gave the verdict DROP"},
		},
		{
			name: "the run does not end",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{target: "LOG"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfAccept,
			want:    want{err: ErrNoWalk, cause: "ACCEPT"},
		},
		{
			name: "an inverted sctp match counts and drops",
			chains: []chain{
				{name: "INPUT", policy: "ACCEPT", rules: []rule{{match: []string{"sctp"}, target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}},
			verdict: nfDrop,
			want:    want{lines: []string{"INPUT:rule:1 ACCEPT"}, hotdrop: "INPUT:1"},
		},
		{
			name: "a chain entered twice, a rule's own conditions decide",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {match: []string{"mark"}, target: "jump U"}}},
				{name: "U", rules: []rule{{src: "10", target: "MARK"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"U", 1, 2}, {"U", 2, 2}},
			verdict: nfDrop,
			want: want{lines: []string{"INPUT:rule:1 jump U", "U:rule:1 continue", "U:return:2 RETURN",
				"INPUT:rule:2 jump U", "U:rule:1 continue", "U:return:2 RETURN", "INPUT:policy:3 DROP"}},
		},
		{
			name: "a chain entered twice, a rule that matched once: ambiguous",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {match: []string{"mark"}, target: "jump U"}}},
				{name: "U", rules: []rule{{match: []string{"limit"}, target: "MARK"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"U", 1, 1}, {"U", 2, 2}},
			verdict: nfDrop,
			want:    want{err: ErrAmbiguous, cause: "after INPUT:1 either U:1 or U:2 came next"},
		},
		{
			name: "a chain entered twice, the rule that ends the run matched in the second",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {target: "MARK"}, {match: []string{"mark"}, target: "jump U"}}},
				{name: "U", rules: []rule{{match: []string{"mark"}, target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"U", 1, 1}, {"U", 2, 1}},
			verdict: nfAccept,
			want: want{lines: []string{"INPUT:rule:1 jump U", "U:return:2 RETURN", "INPUT:rule:2 continue",
				"INPUT:rule:3 jump U", "U:rule:1 ACCEPT"}},
		},
		{
			name: "a chain entered twice, a sticky rule that matched once: impossible",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {match: []string{"mark"}, target: "jump U"}}},
				{name: "U", rules: []rule{{src: "10", match: []string{"tcp"}, target: "MARK"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"U", 1, 1}, {"U", 2, 2}},
			verdict: nfDrop,
			want:    want{err: ErrNoWalk, cause: "U:2"},
		},
		{
			name: "the same, but a target between may have changed the headers",
			chains: []chain{
				{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}, {target: "RAWDNAT"}, {match: []string{"mark"}, target: "jump U"}}},
				{name: "U", rules: []rule{{src: "10", target: "ACCEPT"}}},
			},
			hits:    []visit{{"INPUT", 1, 1}, {"INPUT", 2, 1}, {"INPUT", 3, 1}, {"U", 1, 1}, {"U", 2, 1}},
			verdict: nfAccept,
			want: want{lines: []string{"INPUT:rule:1 jump U", "U:return:2 RETURN", "INPUT:rule:2 continue",
				"INPUT:rule:3 jump U", "U:rule:1 ACCEPT"}},
		},
		{
			name: "more visits than one run makes",
			chains: []chain{
				{name: "INPUT", policy: "DROP"},
			},
			hits:    []visit{{"INPUT", 1, 2}},
			verdict: nfDrop,
			want:    want{err: ErrNoWalk, cause: "INPUT:1"},
		},
		{
			name:    "nothing counted",
			chains:  []chain{{name: "INPUT", policy: "DROP"}},
			verdict: nfDrop,
			want:    want{err: ErrNoWalk},
		},
	}
	for _, tt := range tests {
		for _, family := range []Family{IPv4, IPv6} {
			t.Run(fmt.Sprintf("%s/%v", tt.name, family), func(t *testing.T) {
				tab := build(t, family, tt.chains...)
				var hits []Hit
				for _, v := range tt.hits {
					hits = append(hits, Hit{Index: at(t, tab, v.chain, v.num), Packets: v.n})
				}
				p, err := tab.Walk(input, hits, tt.verdict, nil)
				if tt.want.err != nil {
					if !errors.Is(err, tt.want.err) || !strings.Contains(err.Error(), tt.want.cause) {
						t.Fatalf("got %v, want %v: …%s…", err, tt.want.err, tt.want.cause)
					}
					return
				}
				wantLines(t, p, err, tt.want.lines...)
				if (p.Hotdrop == "") != (tt.want.hotdrop == "") || !strings.Contains(p.Hotdrop, tt.want.hotdrop) {
					t.Errorf("hotdrop %q, want …%q…", p.Hotdrop, tt.want.hotdrop)
				}
			})
		}
	}
}

// TestWalkDepth follows Depth over jumps, gotos and returns.
func TestWalkDepth(t *testing.T) {
	tab := build(t, IPv4,
		chain{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump A"}}},
		chain{name: "A", rules: []rule{{target: "jump B"}}},
		chain{name: "B", rules: []rule{{target: "goto C"}}},
		chain{name: "C"})
	p, err := tab.Walk(input, once(0, 1, 3, 4, 6, 9), nfDrop, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, v := range p.Visits {
		got = append(got, v.Depth)
	}
	if want := []int{0, 1, 2, 3, 1, 0}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v: %v", got, want, lines(p))
	}
}

// TestWalkBig has more rules than a block of counters, and than anybody scans one by one.
func TestWalkBig(t *testing.T) {
	var user []rule
	for i := range 12000 {
		r := rule{match: []string{"mark"}, target: "DROP"}
		if i%6 == 0 {
			r.target = "MARK"
		}
		user = append(user, r)
	}
	tab := build(t, IPv4,
		chain{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}}},
		chain{name: "U", rules: user})
	var hits []Hit
	for i := range tab.Entries {
		if e := &tab.Entries[i]; e.Target == "MARK" || e.IsEnd || e.IsPolicy || e.Kind == TargetJump {
			hits = append(hits, Hit{Index: i, Packets: 1})
		}
	}
	p, err := tab.Walk(input, hits, nfDrop, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Visits) != 2003 || p.Visits[2000].Num != 11995 || !p.Visits[2001].IsEnd {
		t.Errorf("%d visits: %v … %v", len(p.Visits), p.Visits[0], p.Visits[2000:])
	}
}

func BenchmarkWalkBig(b *testing.B) {
	var user []rule
	for range 12000 {
		user = append(user, rule{match: []string{"mark"}, target: "MARK"})
	}
	tab := build(b, IPv4,
		chain{name: "INPUT", policy: "DROP", rules: []rule{{target: "jump U"}}},
		chain{name: "U", rules: user})
	hits := once(0, 1, 6000, len(tab.Entries)-2)
	for b.Loop() {
		if _, err := tab.Walk(input, hits, nfDrop, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWalkGivesUp is the longest that Walk takes.
func BenchmarkWalkGivesUp(b *testing.B) {
	var calls, user []rule
	for range 20 {
		calls = append(calls, rule{match: []string{"mark"}, target: "jump U"})
		user = append(user, rule{match: []string{"mark"}, target: "MARK"})
	}
	tab := build(b, IPv4,
		chain{name: "INPUT", policy: "DROP", rules: calls},
		chain{name: "U", rules: user})
	var hits []Hit
	for i := range tab.Entries {
		switch e := &tab.Entries[i]; {
		case e.Chain == "INPUT":
			hits = append(hits, Hit{Index: i, Packets: 1})
		case e.IsEnd:
			hits = append(hits, Hit{Index: i, Packets: 20})
		case e.Kind == TargetExtension:
			hits = append(hits, Hit{Index: i, Packets: 10})
		}
	}
	for b.Loop() {
		// The policy says DROP, so that no order fits.
		if _, err := tab.Walk(input, hits, nfAccept, nil); !errors.Is(err, ErrAmbiguous) {
			b.Fatal(err)
		}
	}
}

// sim evaluates a table as ipt_do_table does; matches decides anew each time
// whether a rule with conditions matches, and ends what an extension returns.
type sim struct {
	t       *Table
	matches func(i int) bool
	ends    func(i int) (verdict int, ends bool)
}

func (s *sim) run(hook int) (seq []int, verdict int) {
	var stack []int
	i := s.t.HookEntry[hook]
	for len(seq) < 4000 {
		e := &s.t.Entries[i]
		if !e.always && !s.matches(i) {
			i++
			continue
		}
		seq = append(seq, i)
		switch e.Kind {
		case TargetVerdict:
			return seq, e.Verdict
		case TargetReturn:
			if len(stack) == 0 {
				i = s.t.Underflow[hook]
			} else {
				i = stack[len(stack)-1] + 1
				stack = stack[:len(stack)-1]
			}
		case TargetJump:
			stack = append(stack, i)
			i = e.Dest
		case TargetGoto:
			i = e.Dest
		case TargetNext:
			i++
		default:
			if v, ends := s.ends(i); ends {
				return seq, v
			}
			i++
		}
	}
	return nil, 0
}

// count says how many sequences, up to limit, have these counters: every
// outcome of every match is tried, with none of Walk's cleverness. fixed tells
// which entries match always or never in one run, by header.
func (s *sim) count(hook int, hits map[int]int, left, verdict int, fixed func(int) bool, limit int, tries *int) int {
	var from func(i int, stack []int) int
	from = func(i int, stack []int) int {
		if *tries--; *tries < 0 {
			return 0
		}
		e := &s.t.Entries[i]
		n := 0
		take := hits[i] > 0
		if take {
			hits[i]--
			left--
			switch e.Kind {
			case TargetVerdict:
				if left == 0 && e.Verdict == verdict {
					n++
				}
			case TargetReturn:
				if len(stack) == 0 {
					n += from(s.t.Underflow[hook], nil)
				} else {
					n += from(stack[len(stack)-1]+1, stack[:len(stack)-1:len(stack)-1])
				}
			case TargetJump:
				n += from(e.Dest, append(stack[:len(stack):len(stack)], i))
			case TargetGoto:
				n += from(e.Dest, stack)
			case TargetNext:
				n += from(i+1, stack)
			default:
				if left == 0 {
					if endsOf(e) != endsNever {
						n++
					}
				} else if endsOf(e) != endsAlways {
					n += from(i+1, stack)
				}
			}
			hits[i]++
			left++
		}
		if n < limit && !e.always && !(fixed(i) && hits0[i] > 0) && left > 0 {
			n += from(i+1, stack)
		}
		return n
	}
	return from(s.t.HookEntry[hook], nil)
}

var hits0 map[int]int // the run's hits, for count's notion of fixed

func randomTable(t testing.TB, r *rand.Rand) *Table {
	users := 1 + r.Intn(5)
	targets := []string{"ACCEPT", "DROP", "RETURN", "", "LOG", "MARK", "REJECT", "XYZZY", "RETURN", "MARK"}
	rules := func(firstUser int) []rule {
		var out []rule
		for range r.Intn(6) {
			ru := rule{target: targets[r.Intn(len(targets))]}
			if r.Intn(4) > 0 && firstUser < users {
				ru.target = [2]string{"jump ", "goto "}[r.Intn(5)/4] + fmt.Sprint("U", firstUser+r.Intn(users-firstUser))
			}
			switch r.Intn(6) {
			case 0:
				ru.src = "10"
			case 1, 2, 3, 4:
				ru.match = []string{"mark"}
			}
			out = append(out, ru)
		}
		return out
	}
	chains := []chain{
		{name: "INPUT", policy: "DROP", rules: append(rules(0), rules(0)...)},
		{name: "FORWARD", policy: "ACCEPT", rules: rules(0)},
	}
	for u := range users {
		chains = append(chains, chain{name: fmt.Sprint("U", u), rules: rules(u + 1)})
	}
	return build(t, []Family{IPv4, IPv6}[r.Intn(2)], chains...)
}

// TestWalkAgainstSimulator: whatever a ruleset does, Walk returns that very
// sequence, or says it is ambiguous where it truly is.
func TestWalkAgainstSimulator(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	resolved, ambiguous, twice := 0, 0, 0
	rounds := 30000
	if testing.Short() {
		rounds = 3000
	}
	for range rounds {
		tab := randomTable(t, r)
		hook := input + r.Intn(2)
		headers := map[int]bool{} // conditions that look at headers hold or not for the whole run
		for i := range tab.Entries {
			headers[i] = r.Intn(2) == 0
		}
		// XYZZY may have rewritten headers, so that nothing is fixed.
		xyzzy := false
		s := &sim{t: tab}
		s.matches = func(i int) bool {
			if len(tab.Entries[i].Matches) == 0 && !xyzzy {
				return headers[i]
			}
			return r.Intn(3) > 0
		}
		s.ends = func(i int) (int, bool) {
			e := &tab.Entries[i]
			if e.Target == "XYZZY" {
				xyzzy = true
				return r.Intn(3), r.Intn(3) == 0
			}
			return nfDrop, endsOf(e) == endsAlways
		}
		seq, verdict := s.run(hook)
		if seq == nil {
			continue
		}
		counts := map[int]int{}
		for _, i := range seq {
			counts[i]++
		}
		var hits []Hit
		multiple := false
		for i, n := range counts {
			hits = append(hits, Hit{Index: i, Packets: uint64(n)})
			multiple = multiple || n > 1
		}
		if multiple {
			twice++
		}
		p, err := tab.Walk(hook, hits, verdict, nil)
		switch {
		case err == nil:
			resolved++
			got := make([]int, len(p.Visits))
			for i, v := range p.Visits {
				got[i] = v.Index
			}
			if !slices.Equal(got, seq) {
				t.Fatalf("%v: got %v, want %v (%v)", tab.Family, got, seq, lines(p))
			}
			if p.Hotdrop != "" {
				t.Fatalf("hotdrop out of nothing: %s", p.Hotdrop)
			}
		case errors.Is(err, ErrAmbiguous):
			ambiguous++
			hits0 = counts
			fixed := func(i int) bool { return len(tab.Entries[i].Matches) == 0 && !xyzzy }
			tries := 1 << 20
			n := s.count(hook, counts, len(seq), verdict, fixed, 2, &tries)
			if n < 2 && tries >= 0 {
				t.Fatalf("ambiguous, but %d sequence has these counters: %v; %v", n, seq, err)
			}
		default:
			t.Fatalf("%v: run %v with verdict %d: %v", tab.Family, seq, verdict, err)
		}
	}
	t.Logf("%d resolved, %d ambiguous, %d runs with a rule hit twice", resolved, ambiguous, twice)
	if resolved < rounds/2 || ambiguous < rounds/200 || twice < rounds/50 {
		t.Errorf("the random rulesets are too dull")
	}
}

func FuzzWalk(f *testing.F) {
	f.Add(uint8(forward), int32(nfAccept), []byte{1, 1, 2, 1, 4, 1, 6, 1, 11, 1, 14, 1, 21, 1})
	f.Add(uint8(input), int32(nfDrop), []byte{0, 3, 0, 3, 5, 7})
	var tabs []*Table
	for _, n := range fixtureNames(f) {
		tabs = append(tabs, loadFixture(f, n).table)
	}
	f.Fuzz(func(t *testing.T, hook uint8, verdict int32, b []byte) {
		tab := tabs[int(hook>>4)%len(tabs)]
		var hits []Hit
		total := map[int]uint64{}
		for ; len(b) >= 2; b = b[2:] {
			hits = append(hits, Hit{Index: int(int8(b[0])), Packets: uint64(b[1])})
			total[int(int8(b[0]))] += uint64(b[1])
		}
		p, err := tab.Walk(int(hook&15), hits, int(verdict), nil)
		if err != nil {
			if !errors.Is(err, ErrNoWalk) && !errors.Is(err, ErrAmbiguous) {
				t.Fatalf("untyped: %v", err)
			}
			return
		}
		for _, v := range p.Visits {
			total[v.Index]--
		}
		for i, n := range total {
			if n != 0 {
				t.Fatalf("entry %d: %d visits not made", i, n)
			}
		}
	})
}
