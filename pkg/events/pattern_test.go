package events

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/bpf"
)

// whole is all that a journey says, but for its ID and times.
func whole(j *Journey) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%+v %q %d %+v\n", j.First, j.HalfSeen, j.Lost, j.Outcome)
	for i := range j.Steps {
		s := &j.Steps[i]
		place := *s.Place
		place.named = 0
		fmt.Fprintf(&b, "%d %d %+v", s.Kind, s.Verdict, place)
		if t := s.Table; t != nil {
			fmt.Fprintf(&b, " %s %+v %+v %q %+v %+v %+v", t.Name, t.ID, t.Hits, t.Unresolved, t.Before, t.Part.Before, t.Part.Verdict)
			if t.Part.After != nil {
				fmt.Fprintf(&b, " after %+v", t.Part.After)
			}
		}
		if s.NAT != nil {
			fmt.Fprintf(&b, " %+v", *s.NAT)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

type variant struct {
	name string
	run  func(s *script)
}

// Journeys whose records differ a little, each in what a pattern must not take for the same,
// or may not.
var variants = []variant{
	{"plain", func(s *script) { s.part(basic()) }},
	{"longer", func(s *script) {
		p, longer := basic(), ping()
		longer.Len = 1000
		p.before, p.hits = &longer, []bpf.NftraceHit{{Table: 0, Index: 4, Packets: 1, Bytes: 1000}, {Table: 1, Index: 2, Packets: 3, Bytes: 3000}}
		s.part(p)
	}},
	{"bytes of another packet", func(s *script) { p := basic(); p.hits[1].Bytes++; s.part(p) }},
	{"bytes that do not fit, but their sum", func(s *script) {
		p := basic()
		p.hits = append(p.hits, p.hits[0])
		p.hits[0].Bytes++
		p.hits[2].Bytes--
		s.part(p)
	}},
	{"another rule", func(s *script) { p := basic(); p.hits[1].Index++; s.part(p) }},
	{"once more", func(s *script) { p := basic(); p.hits[1] = hit(1, 2, 4); s.part(p) }},
	{"of another table", func(s *script) { p := basic(); p.hits[0].Table = 1; s.part(p) }},
	{"fewer rules", func(s *script) { p := basic(); p.hits = p.hits[:1]; s.part(p) }},
	{"fewer tables", func(s *script) { p := basic(); p.tables, p.hits = p.tables[:1], p.hits[:1]; s.part(p) }},
	{"other tables", func(s *script) { p := basic(); p.tables[1] = "raw"; s.part(p) }},
	{"more runs", func(s *script) { p := basic(); p.runs = 3; s.part(p) }},
	{"another hook", func(s *script) { p := basic(); p.hook = HookLocalIn; s.part(p) }},
	{"another family", func(s *script) { p := basic(); p.pf = PFIPv6; s.part(p) }},
	{"torn", func(s *script) { p := basic(); p.flags = bpf.NftraceRecFlagREC_F_TORN; s.part(p) }},
	{"unseen", func(s *script) { p := basic(); p.flags = bpf.NftraceRecFlagREC_F_UNSEEN; s.part(p) }},
	{"late", func(s *script) { p := basic(); p.flags = bpf.NftraceRecFlagREC_F_LATE; s.part(p) }},
	{"no tables", func(s *script) { p := basic(); p.tables, p.hits = nil, nil; s.part(p) }},
	{"a match dropped it", func(s *script) {
		s.part(part{hook: HookForward, tables: []string{"filter", "mangle"}, runs: 2, hits: []bpf.NftraceHit{hit(1, 4, 1)}})
		s.drop()
	}},
	{"dropped", func(s *script) { s.part(basic()); s.drop() }},
	{"another namespace", func(s *script) { s.netns = 78; s.part(basic()) }},
	{"another device", func(s *script) { p := basic(); p.in = dev(5, "eth5"); s.part(p) }},
	{"tracked", func(s *script) {
		p, known := basic(), ping()
		known.Flags, known.Ctinfo = uint8(bpf.NftracePktFlagPKT_F_CT), 2
		p.hook = HookPreRouting
		s.part(p)
		s.after(known)
	}},
	{"rewritten", func(s *script) {
		p, rewritten := basic(), dnatted()
		p.hook = HookPreRouting
		s.part(p)
		s.nat(1)
		p.before = &rewritten
		s.part(p)
	}},
	{"torn at OUTPUT", func(s *script) { s.part(tornOutput()); s.xmit() }},
	{"torn before NAT and behind it", func(s *script) { s.part(tornOutput()); s.nat(1); s.part(tornOutput()); s.xmit() }},
}

func tornOutput() part {
	p := basic()
	p.hook, p.flags = HookLocalOut, bpf.NftraceRecFlagREC_F_TORN
	return p
}

func basic() part {
	return part{hook: HookForward, tables: []string{"filter", "mangle"}, runs: -1, hits: []bpf.NftraceHit{hit(0, 4, 1), hit(1, 2, 3)}}
}

// What is known of a pattern makes no difference to what is made of a record, whichever
// records came before it.
func TestPatterns(t *testing.T) {
	// play runs variants one after another.
	play := func(a *Assembler, each func(v variant, got string), vs ...variant) {
		for _, v := range vs {
			s := newScript(t, a, a.stats.Packets+1)
			s.now += s.jid * uint64(3*settle)
			v.run(s)
			s.end(0)
			each(v, whole(s.journey()))
		}
	}
	// Names are known by then.
	elsewhere := variant{"", func(s *script) { s.netns = 78; s.part(basic()) }}
	want := map[string]string{}
	for _, v := range variants {
		play(NewAssembler(), func(v variant, got string) { want[v.name] = got }, variants[0], elsewhere, v)
	}
	a := NewAssembler()
	check := func(v variant, got string) {
		if got != want[v.name] {
			t.Fatalf("%s:\n got %s\nwant %s", v.name, got, want[v.name])
		}
	}
	play(a, check, variants[0], elsewhere)
	for _, first := range variants {
		for _, second := range variants {
			play(a, check, first, second, first)
		}
	}
}

// Records of one pattern are found to be: of these variants, but for the bytes that are not
// the packet's alone.
func TestPatternsAreFound(t *testing.T) {
	a := NewAssembler()
	find := func(v func(*script), jid uint64) *Pattern {
		s := newScript(t, a, jid)
		s.now += jid * 1_000_000_000
		v(s)
		js, p := a.Flush(1), (*Pattern)(nil)
		if st := js[0].Steps[0]; st.Table != nil {
			p = st.Table.Part.Pattern
		}
		return p
	}
	one := find(variants[0].run, 1)
	if one == nil {
		t.Fatal("no pattern")
	}
	if p := find(variants[1].run, 2); p != one {
		t.Error("a longer packet has another pattern")
	}
	for i, v := range variants[2:] {
		// Of each variant the first record.
		var first []byte
		s := newScript(t, nil, 1)
		s.keep = func(raw []byte) {
			if first == nil {
				first = copyOf(raw)
			}
		}
		v.run(s)
		r, hits, _, _, err := recHook(first)
		if err != nil {
			t.Fatal(err)
		}
		if one.fits(r, first, hits) != (v.name == "dropped" || v.name == "late") {
			t.Errorf("%s: fits: %v", v.name, one.fits(r, first, hits))
		}
		if p := find(v.run, uint64(10+i)); p == one && v.name != "dropped" && v.name != "late" {
			t.Errorf("%s: was taken for the same", v.name)
		} else if strings.HasPrefix(v.name, "bytes") && p != nil {
			t.Errorf("%s: has a pattern", v.name)
		}
	}
	// What the kernel counted tells more than the record of the part.
	if p := find(variants[10].run, 100); variants[10].name != "more runs" || p != nil {
		t.Error("a part that does not follow from its pattern has one")
	}
}

// A device's name is the one that it had last, also where it gets an old one back.
func TestRenamed(t *testing.T) {
	a := NewAssembler()
	for i, name := range []string{"eth0", "wan0", "eth0", "eth0", "wan0"} {
		// Its port is recorded by its number only.
		s := newScript(t, a, uint64(i+1))
		s.now += uint64(i) * 1_000_000_000
		port := basic()
		port.in = dev(9, "br0")
		s.part(port)
		s.xmit()
		p := basic()
		p.in = dev(3, name)
		if name == "eth0" { // else one would take the other's place
			p.hook = HookLocalIn
		}
		s.part(p)
		s.end(0)
		j := s.journey()
		if got := j.Steps[0].PhysIn.Name; got != name {
			t.Errorf("%d: port %q, want %q", i, got, name)
		}
		if got := j.Steps[4].In.Name; got != name {
			t.Errorf("%d: device %q, want %q", i, got, name)
		}
	}
}

// A port that no record names is asked for once it is known that the packet is wanted, and again as
// long as nobody knows; what a record names it then is its name.
func TestPortName(t *testing.T) {
	a := NewAssembler()
	asked, known := false, ""
	a.PortName = func(netns uint32, index int) string {
		if asked = true; netns != 77 || index != 3 {
			t.Errorf("asked for %d in %d", index, netns)
		}
		return known
	}
	for i, tt := range []struct {
		flags    bpf.NftraceRecFlag
		known    string
		recorded string // behind it
		want     string
		asked    bool
	}{
		{0, "", "", "", true},
		{bpf.NftraceRecFlagREC_F_TENTATIVE, "vethc1", "", "", false},
		{0, "vethc1", "", "vethc1", true},
		{0, "other", "", "vethc1", false},
		{0, "other", "renamed", "renamed", false},
	} {
		asked, known = false, tt.known
		s := newScript(t, a, uint64(i+1))
		s.now += uint64(i) * 1_000_000_000
		port := basic()
		port.in, port.flags = dev(9, "br0"), tt.flags
		s.part(port)
		if tt.recorded != "" {
			s.device(bpf.NftraceRecTypeREC_XMIT, 0, dev(3, tt.recorded))
		}
		s.end(tt.flags)
		for _, j := range s.journeys() {
			if got := j.Steps[0].PhysIn; got != (Device{3, tt.want}) {
				t.Errorf("%d: port %+v, want %q", i, got, tt.want)
			}
		}
		if asked != tt.asked {
			t.Errorf("%d: asked %v, want %v", i, asked, tt.asked)
		}
	}
}

// OnRun is told of each pattern's runs once, and of each again whose place another took.
func TestPatternsAreBounded(t *testing.T) {
	a := NewAssembler()
	told := map[uint64]int{}
	a.OnRun = func(s *Step) { told[s.Table.ID.Gen]++ }
	const n = 4 << patternBits
	for round := range 2 {
		for gen := range uint64(n) {
			s := newScript(t, a, uint64(round)*n+gen+1)
			p := basic()
			p.gen = gen
			p.hits[0].Index = uint32(gen)
			s.part(p)
			a.Flush(1)
		}
	}
	kept := 0
	for _, pair := range a.patterns {
		for _, p := range pair {
			if p != nil {
				kept++
			}
		}
	}
	if kept < 1<<patternBits/2 {
		t.Errorf("%d patterns are kept", kept)
	}
	for gen := range uint64(n) {
		if told[1+gen] == 0 {
			t.Fatalf("nobody was told of generation %d", gen)
		}
	}
}

// Two patterns that take turns are both kept, whichever they are: one packet has several.
func TestPatternsTakeTurns(t *testing.T) {
	for other := range uint64(4 << patternBits) {
		a := NewAssembler()
		told := 0
		a.OnRun = func(*Step) { told++ }
		for turn, gen := range []uint64{0, 1 + other, 0, 1 + other} {
			s := newScript(t, a, uint64(turn)+1)
			p := basic()
			p.gen = gen
			p.hits = p.hits[:1]
			p.hits[0].Index = uint32(gen)
			p.tables, p.runs = p.tables[:1], 1
			s.part(p)
			a.Flush(1)
		}
		if told != 2 {
			t.Fatalf("pattern %d and the first: told of %d new ones, want 2", other, told)
		}
	}
}
