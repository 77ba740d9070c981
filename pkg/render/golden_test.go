package render

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/nftrace/nftrace/pkg/events"
)

var update = flag.Bool("update", false, "write testdata from what is printed now")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(got, want) {
		return
	}
	g, w := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
	n := 0
	for n < min(len(g), len(w)) && g[n] == w[n] {
		n++
	}
	t.Errorf("%s:%d differs (go test ./pkg/render -update rewrites it)\n got %q\nwant %q", path, n+1, at(g, n), at(w, n))
}

func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return "(the end)"
}

func TestGolden(t *testing.T) {
	for name, j := range journeys() {
		t.Run(name, func(t *testing.T) {
			var tree, color, trace, js bytes.Buffer
			for _, err := range []error{
				Tree(&tree, j, TreeOptions{}), Tree(&color, j, TreeOptions{Color: true}), Trace(&trace, j), JSON(&js, j),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			golden(t, name+".tree", tree.Bytes())
			golden(t, name+".trace", trace.Bytes())

			// Colour adds nothing but colour.
			if s := regexp.MustCompile("\x1b\\[[0-9;]+m").ReplaceAllString(color.String(), ""); s != tree.String() {
				t.Errorf("in colour:\n%s", s)
			}
			// No line ends in blanks but TRACE's own, and none holds a control character.
			for _, l := range strings.Split(tree.String()+trace.String()+js.String(), "\n") {
				checkLine(t, l)
				if strings.HasSuffix(l, " ") && !strings.HasPrefix(l, "TRACE: ") {
					t.Errorf("blank at the end of %q", l)
				}
			}
			if strings.Count(js.String(), "\n") != 1 || !json.Valid(js.Bytes()) {
				t.Errorf("not one line of JSON: %s", js.String())
			}
		})
	}
}

// What the published TRACE logs say, and nothing else.
func TestScenarioLines(t *testing.T) {
	want := map[string]string{
		"s1-request": "raw:PREROUTING:policy:1 mangle:PREROUTING:policy:1 nat:PREROUTING:policy:2 mangle:FORWARD:policy:1 filter:FORWARD:rule:1 filter:DOCKER-USER:return:1 filter:FORWARD:rule:2 filter:DOCKER-ISOLATION-STAGE-1:return:2 filter:FORWARD:rule:4 filter:DOCKER:return:1 filter:FORWARD:rule:6 mangle:POSTROUTING:policy:1 nat:POSTROUTING:policy:2",
		"s1-reply":   "raw:PREROUTING:policy:1 mangle:PREROUTING:policy:1 mangle:FORWARD:policy:1 filter:FORWARD:rule:1 filter:DOCKER-USER:return:1 filter:FORWARD:rule:2 filter:DOCKER-ISOLATION-STAGE-1:return:2 filter:FORWARD:rule:3 mangle:POSTROUTING:policy:1",
	}
	js := journeys()
	for name, seq := range want {
		var b bytes.Buffer
		if err := Trace(&b, js[name]); err != nil {
			t.Fatal(err)
		}
		var got []string
		for l := range strings.Lines(b.String()) {
			got = append(got, strings.Fields(l)[1])
		}
		if g := strings.Join(got, " "); g != seq {
			t.Errorf("%s\n got %s\nwant %s", name, g, seq)
		}
	}
}

// The schema: an indented object with every kind of step in it.
func TestJSONSchema(t *testing.T) {
	j := journeys()["s3-request"]
	flowtable, sent := journeys()["flowtable-nat"].Steps[:1], journeys()["sent-on"].Steps[:1]
	j.Steps = slices.Concat(j.Steps[:1], j.Steps[4:5], j.Steps[len(j.Steps)-2:], flowtable, sent)
	j.Steps[1].Table.Rules = j.Steps[1].Table.Rules[:3]
	j.Steps[1].Table.Met = append(j.Steps[1].Table.Met[:1],
		events.Met{From: 1, Unsure: "an earlier target may have changed it"},
		events.Met{From: 2, Pkt: ptr(with(*j.Steps[1].Table.Before, func(p *events.Packet) { p.Mark = 1 }))})
	j.Outcome = events.Outcome{Kind: events.OutDropped, Step: 1, Rule: 0}
	var b, pretty bytes.Buffer
	if err := JSON(&b, j); err != nil {
		t.Fatal(err)
	}
	if err := json.Indent(&pretty, b.Bytes(), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden(t, "schema.json", pretty.Bytes())

	b.Reset()
	if err := JSON(&b, &events.Journey{}); err != nil {
		t.Fatal(err)
	}
	pretty.Reset()
	if err := json.Indent(&pretty, b.Bytes(), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden(t, "schema-zero.json", pretty.Bytes())
}

// What JSON says of nf_tables' tables and rules.
func TestJSONNFT(t *testing.T) {
	for _, name := range []string{"nft", "nft-compat", "nft-both", "nft-unresolved", "nft-hostile"} {
		var b, pretty bytes.Buffer
		if err := JSON(&b, journeys()[name]); err != nil {
			t.Fatal(err)
		}
		var o Object
		if err := json.Unmarshal(b.Bytes(), &o); err != nil {
			t.Fatal(err)
		}
		// Packets are not what this is about.
		type table struct {
			Name       string `json:"name"`
			Engine     string `json:"engine"`
			Family     string `json:"family"`
			BaseChain  string `json:"base_chain"`
			Compat     bool   `json:"compat"`
			Unresolved string `json:"unresolved"`
			Verdict    string `json:"verdict"`
			Rules      []Rule `json:"rules"`
		}
		var tables []table
		for _, s := range o.Steps {
			if s.Table == nil {
				continue
			}
			r := s.Table
			for i := range r.Rules {
				r.Rules[i].Packet = nil
			}
			tables = append(tables, table{r.Name, r.Engine, r.Family, r.BaseChain, r.Compat, r.Unresolved, s.Verdict, r.Rules})
		}
		enc := json.NewEncoder(&pretty)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(struct {
			Tables  []table `json:"tables"`
			Outcome Outcome `json:"outcome"`
		}{tables, o.Outcome}); err != nil {
			t.Fatal(err)
		}
		golden(t, name+".json", appendJSONSafe(nil, pretty.Bytes()))
	}
}

// JSON loses nothing of a hostile string that is UTF-8.
func TestJSONHostile(t *testing.T) {
	const name = "c1\x1b]0;pwned\a\u202e\u009b\x7f<b>\"\\"
	j := journey(ping(c2, c1, false)).netns(c1NS, name).deliver().delivered()
	var b bytes.Buffer
	if err := JSON(&b, j); err != nil {
		t.Fatal(err)
	}
	var o Object
	if err := json.Unmarshal(b.Bytes(), &o); err != nil {
		t.Fatal(err)
	}
	if o.Outcome.NetnsName != name {
		t.Errorf("got %q", o.Outcome.NetnsName)
	}
	if str("a\xffb") != `a\xffb` {
		t.Errorf("got %q", str("a\xffb"))
	}
}

type countingWriter struct {
	writes [][]byte
	err    error
	short  bool
}

func (w *countingWriter) Write(b []byte) (int, error) {
	w.writes = append(w.writes, bytes.Clone(b))
	if w.short {
		return len(b) - 1, nil
	}
	return len(b), w.err
}

func TestRenderers(t *testing.T) {
	for name, tt := range map[string]struct {
		write func(io.Writer, *events.Journey) error
		made  Renderer
		sep   string // between packets
	}{
		"tree":  {func(w io.Writer, j *events.Journey) error { return Tree(w, j, TreeOptions{}) }, NewTree(TreeOptions{}), "\n"},
		"trace": {Trace, NewTrace(TraceOptions{}), ""},
		"json":  {JSON, NewJSON(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			js := journeys()
			w := &countingWriter{}
			got := []byte("before\n")
			names := []string{"s1-request", "s1-reply", "s1-reply"}
			for _, n := range names {
				if err := tt.write(w, js[n]); err != nil {
					t.Fatal(err)
				}
				got = tt.made.Append(got, js[n])
			}
			if len(w.writes) != len(names) {
				t.Fatalf("%d writes for %d packets", len(w.writes), len(names))
			}
			if want := "before\n" + string(bytes.Join(w.writes, []byte(tt.sep))); string(got) != want {
				t.Errorf("got %q\nwant %q", got, want)
			}
			if err := tt.write(&countingWriter{err: syscall.EPIPE}, js["s1-reply"]); !errors.Is(err, syscall.EPIPE) {
				t.Errorf("got %v", err)
			}
			if err := tt.write(&countingWriter{short: true}, js["s1-reply"]); !errors.Is(err, io.ErrShortWrite) {
				t.Errorf("got %v", err)
			}
		})
	}
	// Nothing to say is nothing written.
	w := &countingWriter{}
	if err := Trace(w, &events.Journey{}); err != nil || len(w.writes) != 0 {
		t.Errorf("%v, %d writes", err, len(w.writes))
	}
}

// FuzzJourney puts hostile strings, bytes and numbers everywhere.
func FuzzJourney(f *testing.F) {
	f.Add("filter", "FORWARD", "-j ACCEPT", "ACCEPT", "eth0", "c1", []byte(echo4.bytes()), uint8(2), uint8(2), 1, 0, 0, 64)
	f.Add("nat\x1b", "\u202e", "\xff", "DROP\n", "", "\x00", []byte{}, uint8(7), uint8(200), -1, 99, -5, -7)
	f.Fuzz(func(t *testing.T, table, chain, text, action, dev, ns string, data []byte, pf, hook uint8, verdict, step, rule, depth int) {
		p := events.Packet{Family: pf, EtherType: 0x0800, Len: len(data), Data: data, CT: ns}
		d := events.Device{Index: rule, Name: dev}
		at := events.Step{Place: &events.Place{PF: pf, Hook: hook, In: d, PhysOut: d}, Kind: events.StepTable, NetnsName: ns, Verdict: verdict}
		tab, hk, nat := at, at, at
		tab.Table = &events.TableRun{Name: table, Before: &p, After: &p, Unresolved: text, Rules: []events.Rule{
			{Chain: chain, Type: events.RuleType(action), Num: rule, Text: text, Action: action, Depth: depth},
			{Chain: chain, Type: events.TypePolicy, Num: rule, IsPolicy: true, Action: action},
		}, Met: []events.Met{{Pkt: &p}, {From: 1, Unsure: text}}}
		nft := tab
		native := *tab.Table
		native.NFT = &events.NFTRun{Family: pf, Chain: chain, Type: text, Priority: depth, Compat: step&1 == 0}
		nft.Table = &native
		hk.Kind = events.StepHook
		nat.Kind, nat.NAT = events.StepNAT, &events.NAT{Source: verdict > 0, Before: events.Tuple{Proto: hook}}
		j := &events.Journey{First: p, HalfSeen: text, Lost: uint64(verdict),
			Steps: []events.Step{nat, tab, nft, nat, hk,
				{Place: &events.Place{Out: d}, Kind: events.StepXmit}, {Place: &events.Place{Out: d, Netns: 5}, Kind: events.StepBridge},
				{Place: &events.Place{}, Kind: 99}},
			Outcome: events.Outcome{Kind: events.OutcomeKind(action), Device: d, NetnsName: ns, Step: step, Rule: rule}}
		var b bytes.Buffer
		for _, err := range []error{Tree(&b, j, TreeOptions{}), Trace(&b, j), JSON(&b, j)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		text = b.String()
		if !utf8.ValidString(text) || !strings.HasSuffix(text, "\n") {
			t.Fatalf("%q", text)
		}
		lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		for _, l := range lines {
			checkLine(t, l)
		}
		if !json.Valid([]byte(lines[len(lines)-1])) {
			t.Errorf("%q", lines[len(lines)-1])
		}
	})
}
