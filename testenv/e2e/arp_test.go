package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"github.com/nftrace/nftrace/testenv/rulegen"
	"github.com/nftrace/nftrace/testenv/topo"
)

// An arpCase is a ruleset of arptables. ARP has no TRACE. What the kernel tells of a packet is in
// the rules' counters, and these are read behind each line of the traffic, which sends packets of
// one kind: how often nftrace names each rule meanwhile must be how often it counted, and the order
// in which it names them for each packet one that the rules allow.
type arpCase struct {
	name    string
	rules   string // arguments of arptables, a command a line
	traffic string // behind arpTraffic
	hits    string // CHAIN NUMBER… or CHAIN policy: what must be met, so that a dead ruleset shows
	legacy  bool   // arptables-nft does not know all of it
	own     string // why the case needs an nftrace of its own, started when the rules are there
}

// arpTraffic is asked and answered, for this host and through its bridge, and what this host asks.
const arpTraffic = `
c2 arp -n 7 172.17.0.1
c2 arp -n 3 -from 172.17.0.77 172.17.0.1
c2 arp -n 5 -op 2 -to 02:00:ac:11:00:01 172.17.0.1
c2 arp -n 11 -op 2 -to 02:00:ac:11:00:02 172.17.0.2
c1 arp -n 2 -op 2 -to 02:00:ac:11:00:03 172.17.0.3
ext arp -n 13 10.211.55.8
ext arp -n 17 10.211.55.99
- h udp-send -n 1 10.211.55.90:9
- h udp-send -n 1 10.211.55.91:9
- h udp-send -n 1 172.17.0.92:9
sh for d in eth0 docker0; do ip -n h neigh flush dev $d nud failed nud incomplete nud stale; done
`

// arpSetup lets namespace h ask once and no more.
const arpSetup = `
ip netns exec h sh -c 'cd /proc/sys/net/ipv4/neigh; for d in eth0 docker0; do echo 1 > $d/mcast_solicit; done'
`

func parseARP(name string, data []byte) (*arpCase, error) {
	c := &arpCase{name: name}
	for _, f := range txtar.Parse(data).Files {
		switch text := string(f.Data); f.Name {
		case "rules":
			rules, err := expand(text)
			if err != nil {
				return nil, err
			}
			c.rules = rules
		case "traffic":
			c.traffic = text
		case "hits":
			c.hits = text
		case "legacy":
			c.legacy = true
		case "own":
			if c.own = strings.TrimSpace(text); c.own == "" {
				return nil, errors.New("own, and no reason")
			}
		default:
			return nil, fmt.Errorf("no such section: %q", f.Name)
		}
	}
	if c.rules == "" || c.hits == "" {
		return nil, errors.New("no rules, or no hits")
	}
	return c, nil
}

// needsOwn: see truth.needsOwn.
func (c *arpCase) needsOwn() bool { return c.own != "" }

// TestTruthARP holds the rules that nftrace names against the rules' own counters, of
// arptables-legacy and of arptables-nft. NFTRACE_TRUTH and NFTRACE_SEEDS are as in TestTruth.
func TestTruthARP(t *testing.T) {
	cases := rulesets(t, "arp", 15, parseARP)
	from, to := seeds(t)
	for seed := from; seed <= to; seed++ {
		cases = append(cases, &arpCase{name: fmt.Sprintf("seed-%d", seed), rules: rulegen.ARP(seed), legacy: true})
	}
	cases = some(t, "NFTRACE_TRUTH", cases)
	needVM(t)
	if _, err := exec.LookPath("nftrace"); err != nil {
		t.Skip("no nftrace in PATH")
	}
	for _, program := range []string{"arptables-legacy", "arptables-nft"} {
		t.Run(program, func(t *testing.T) {
			up(t, "bare")
			shell(t.Context(), t, t.TempDir(), "setup", nil, arpSetup)
			var fit []*arpCase
			for _, c := range cases {
				// nf_tables has no hook at which bridged ARP passes.
				if program == "arptables-legacy" || !c.legacy && !strings.Contains(c.rules, "FORWARD") {
					fit = append(fit, c)
				}
			}
			if program == "arptables-legacy" {
				// Before nftrace, which would miss the first packets of one that a rule brought.
				sh(t, "modprobe -a arp_tables arptable_filter arpt_mangle")
			}
			// Debian's 5.10 does not take MARK for ARP ("not valid for this family"): there such rules
			// only count.
			if strings.HasPrefix(read(t, "/proc/sys/kernel/osrelease"), "5.10.") {
				for _, c := range fit {
					c.rules = arpMark.ReplaceAllString(c.rules, "")
				}
			}
			var total tally
			run := func(c *arpCase, w *watch) {
				if !t.Run(c.name, func(t *testing.T) {
					packets, lines := runARP(t, program, c, w)
					total.rulesets++
					total.packets += packets
					total.lines += lines
				}) {
					total.failed++
				}
			}
			runTogether(t, fit, run, arpRest(program), arpFlags...)
			t.Logf("compared: %d rulesets, %d packets, %d lines; %d rulesets differ", total.rulesets, total.packets, total.lines, total.failed)
		})
	}
}

var arpMark = regexp.MustCompile(` -j MARK --\w+-mark \S+`)

var arpFlags = []string{"--format", "json", "arp"}

// arpRest checks what nftrace prints when no case runs.
func arpRest(program string) func(rest []byte) error {
	return func(rest []byte) error {
		runs, _, err := arpRuns(rest, program)
		if err == nil && len(runs) > 0 {
			err = fmt.Errorf("%d packets that no case has sent", len(runs))
		}
		return err
	}
}

// runARP runs one case, under the nftrace that is there or one of its own.
func runARP(t *testing.T, program string, c *arpCase, w *watch) (packets, lines int) {
	start := time.Now()
	var b strings.Builder
	fmt.Fprintf(&b, "set -e\n%s -F\n%[1]s -X\n", program)
	for _, chain := range []string{"INPUT", "OUTPUT", "FORWARD"} {
		if chain != "FORWARD" || program == "arptables-legacy" {
			fmt.Fprintf(&b, "%s -P %s ACCEPT\n", program, chain)
		}
	}
	for line := range strings.Lines(c.rules) {
		if line = strings.TrimSpace(line); line != "" {
			fmt.Fprintf(&b, "%s %s\n", program, line)
		}
	}
	if err := topo.Shell(t.Context(), "h", b.String()); err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	loaded := time.Now()
	if w == nil {
		w = startWatch(t, arpFlags...)
		defer w.end(t, arpRest(program))
	}
	sent := startSender(t)
	readings := []*arpReading{readARP(t, program)}
	for line := range strings.Lines(arpTraffic + c.traffic) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		sent.line(t, line)
		if !strings.HasPrefix(line, "sh ") {
			readings = append(readings, readARP(t, program))
		}
	}
	sent.end(t)
	traced := time.Now()
	var runs []arpRun
	last := readings[0]
	var output []byte
	err := w.take(func(out []byte) (err error) {
		output = bytes.Clone(out)
		last = readARP(t, program)
		if runs, packets, err = arpRuns(out, program); err != nil {
			return err
		}
		return compareARP(append(slices.Clone(readings), last), runs)
	})
	if err != nil {
		t.Errorf("%v\nrules:\n%s\n%s\n%s", err, c.rules, last.text, output)
	}
	hits := last.minus(readings[0])
	for line := range strings.Lines(c.hits) {
		words := strings.Fields(line)
		for _, w := range words[1:] {
			rules := len(last.chains[words[0]].rules)
			n, err := strconv.Atoi(w)
			switch {
			case err != nil:
				n = rules + 1
			case n < 1 || n > rules:
				t.Errorf("chain %s has %d rules, none is %s", words[0], rules, w)
			}
			if met, counted := hits[arpRule{words[0], n}]; counted && met == 0 {
				t.Errorf("%s %s was not met", words[0], w)
			}
		}
	}
	for _, r := range runs {
		lines += len(r.lines)
	}
	t.Logf("%d packets, %d lines, %d rules; load %v, trace %v, check %v", packets, lines, len(hits), loaded.Sub(start).Round(time.Millisecond),
		traced.Sub(loaded).Round(time.Millisecond), time.Since(traced).Round(time.Millisecond))
	return packets, lines
}

// A sender is a traffic script that gets a line when what the one before has sent is read.
type sender struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func startSender(t *testing.T) *sender {
	t.Helper()
	s := &sender{cmd: exec.CommandContext(t.Context(), "traffic", "script", "/dev/stdin")}
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return s
}

// line returns when what the line says is done.
func (s *sender) line(t *testing.T, line string) {
	t.Helper()
	const done = "done\n"
	fmt.Fprintf(s.stdin, "%s\nsay %s", line, done)
	for {
		said, err := s.out.ReadString('\n')
		if said == done {
			return
		}
		if err != nil {
			t.Fatalf("%s: %s%v", line, said, err)
		}
		t.Log(said)
	}
}

func (s *sender) end(t *testing.T) {
	t.Helper()
	s.stdin.Close()
	if err := s.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

// arpRule is a rule, or the end of a chain, of a built-in one its policy.
type arpRule struct {
	chain string
	num   int // from 1; the end is behind the last rule
}

// arpReading is what the program lists at a time.
type arpReading struct {
	from, to int64 // ns of CLOCK_MONOTONIC
	chains   map[string]*arpChain
	text     string
}

type arpChain struct {
	rules  []arpListed
	policy string // empty of user chains
	// packets that met the policy; -1 where that is not counted.
	packets int
}

type arpListed struct {
	text, target string
	packets      int
	always       bool // it has no conditions
}

func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// readARP reads the counters of all rules, and of policies where they are counted.
func readARP(t *testing.T, program string) *arpReading {
	t.Helper()
	from := monotonic()
	var out []byte
	err := topo.Within("h", func() (err error) {
		out, err = exec.Command(program, "-L", "-n", "-v", "-x").Output()
		return err
	})
	to := monotonic()
	if err != nil {
		t.Fatal(err)
	}
	r, err := parseARPListing(string(out))
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	r.from, r.to = from, to
	return r
}

var (
	arpChainLine = regexp.MustCompile(`^Chain (\S+) \((?:policy (\w+)(?: (\d+) packets, \d+ bytes)?|\d+ references)\)$`)
	arpRuleLine  = regexp.MustCompile(`^(.*?) *, pcnt=(\d+) -- bcnt=\d+ *$`)
	arpAny       = regexp.MustCompile(`(^| )-[io] \*( |$)`)
	arpCondition = regexp.MustCompile(`(^| )(!|-[iosd]|--(src|dst)-mac|--h-length|--opcode|--h-type|--proto-type) `)
)

// parseARPListing reads what arptables -L -n -v -x prints. The rules' texts are as without -v.
func parseARPListing(text string) (*arpReading, error) {
	r := &arpReading{chains: map[string]*arpChain{}, text: text}
	var chain *arpChain
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if m := arpChainLine.FindStringSubmatch(line); m != nil {
			chain = &arpChain{policy: m[2], packets: -1}
			if n, err := strconv.Atoi(m[3]); err == nil {
				chain.packets = n
			}
			r.chains[m[1]] = chain
		} else if m := arpRuleLine.FindStringSubmatch(line); m != nil && chain != nil {
			rule := arpListed{text: m[1]}
			for arpAny.MatchString(rule.text) {
				rule.text = strings.TrimSpace(arpAny.ReplaceAllString(rule.text, " "))
			}
			var err error
			if rule.packets, err = strconv.Atoi(m[2]); err != nil {
				return nil, err
			}
			if f := strings.Fields(rule.text); len(f) > 1 && f[0] == "-j" {
				rule.target = f[1]
			}
			rule.always = !arpCondition.MatchString(rule.text + " ")
			chain.rules = append(chain.rules, rule)
		} else if line != "" && !strings.HasPrefix(line, "#") {
			return nil, fmt.Errorf("what is this? %q", line)
		}
	}
	if len(r.chains) < 2 {
		return nil, fmt.Errorf("no chains:\n%s", text)
	}
	return r, nil
}

// minus is how often each rule, and policy, has counted since another reading.
func (r *arpReading) minus(before *arpReading) map[arpRule]int {
	out := map[arpRule]int{}
	for name, c := range r.chains {
		b := before.chains[name]
		for i, rule := range c.rules {
			out[arpRule{name, i + 1}] = rule.packets - b.rules[i].packets
		}
		if c.packets >= 0 {
			out[arpRule{name, len(c.rules) + 1}] = c.packets - b.packets
		}
	}
	return out
}

// An arpRun is what nftrace has of a packet in the table.
type arpRun struct {
	at                        int64
	hook, verdict, unresolved string
	lines                     []arpNamed
	texts                     bool // those of lines are as the program lists them
}

type arpNamed struct {
	arpRule
	text        string
	policy, end bool
}

func (n arpNamed) String() string { return fmt.Sprintf("%s:%d", n.chain, n.num) }

// arpRuns are those of nftrace's JSON, by time.
func arpRuns(data []byte, program string) (runs []arpRun, packets int, err error) {
	engine := map[string]string{"arptables-legacy": "xtables", "arptables-nft": "nf_tables"}[program]
	for d := json.NewDecoder(bytes.NewReader(data)); ; packets++ {
		var o struct {
			HalfSeen string `json:"half_seen"`
			Lost     int
			Steps    []struct {
				Kind, Family, Hook, Verdict string
				NetnsName                   string `json:"netns_name"`
				TimeNS                      int64  `json:"time_ns"`
				Table                       *struct {
					Name, Engine, Unresolved string
					Rules                    []struct {
						Trace, Chain, Text string
						Number             int
						IsPolicy           bool `json:"is_policy"`
						IsEnd              bool `json:"is_end"`
					}
				}
			}
		}
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, 0, err
		}
		if o.HalfSeen != "" || o.Lost != 0 {
			return nil, 0, fmt.Errorf("a packet was not seen whole: %s, %d records lost", o.HalfSeen, o.Lost)
		}
		for _, s := range o.Steps {
			if s.Kind != "table" || s.Table.Engine != engine || s.Family != "arp" || s.NetnsName != "h" {
				continue
			}
			r := arpRun{at: s.TimeNS, hook: s.Hook, verdict: s.Verdict, unresolved: s.Table.Unresolved, texts: engine == "xtables"}
			for _, l := range s.Table.Rules {
				n := arpNamed{arpRule{l.Chain, l.Number}, l.Text, l.IsPolicy, l.IsEnd}
				if want := regexp.MustCompile(fmt.Sprintf("^arp:%s:%s:(rule|return|policy):%d$", s.Table.Name, l.Chain, l.Number)); s.Table.Name != "filter" || !want.MatchString(l.Trace) {
					return nil, 0, fmt.Errorf("%v of table %s is in the trace format %q", n, s.Table.Name, l.Trace)
				}
				r.lines = append(r.lines, n)
			}
			runs = append(runs, r)
		}
	}
	slices.SortStableFunc(runs, func(a, b arpRun) int { return cmp.Compare(a.at, b.at) })
	return runs, packets, nil
}

// compareARP holds runs against the rules, and between each two readings the number of those that
// named a rule against what it has counted meanwhile. If a packet came while the counters were
// read it is not known which of the two it belongs to: these are then taken together.
func compareARP(readings []*arpReading, runs []arpRun) error {
	var errs []error
	first := readings[0]
	for _, r := range runs {
		if err := first.allows(r); err != nil {
			errs = append(errs, fmt.Errorf("%s %v: %w", r.hook, r.lines, err))
		}
	}
	if len(runs) > 0 && runs[0].at <= first.to {
		errs = append(errs, errors.New("a packet came before the traffic began"))
	}
	last := readings[len(readings)-1]
	for since, rest := first, runs; since != last; {
		said := map[arpRule]int{}
		var until *arpReading
		for _, r := range readings[1:] {
			if until = r; r.from < since.to {
				continue
			}
			for len(rest) > 0 && (rest[0].at < r.from || r == last) {
				for _, l := range rest[0].lines {
					said[l.arpRule]++
				}
				rest = rest[1:]
			}
			if len(rest) == 0 || rest[0].at > r.to {
				break
			}
		}
		for rule, n := range until.minus(since) {
			if said[rule] != n {
				errs = append(errs, fmt.Errorf("%s:%d: nftrace named it %d times, it counted %d (line %d of the traffic on)",
					rule.chain, rule.num, said[rule], n, slices.Index(readings, since)+1))
			}
		}
		since = until
	}
	return errors.Join(errs...)
}

// allows tells whether a packet can go through the rules as a run has it. The counters tell
// how often it met each.
func (r *arpReading) allows(run arpRun) error {
	var stack []arpRule // where chains go on
	at := arpRule{run.hook, 1}
	verdict := ""
	if run.unresolved != "" {
		return fmt.Errorf("unresolved: %s", run.unresolved)
	}
	for _, l := range run.lines {
		c := r.chains[at.chain]
		switch {
		case verdict != "":
			return fmt.Errorf("%v is behind what ends the run", l)
		case c == nil || l.chain != at.chain || l.num < at.num || l.num > len(c.rules)+1:
			return fmt.Errorf("%v cannot be the next at %s:%d", l, at.chain, at.num)
		}
		for i := at.num; i < l.num; i++ {
			if c.rules[i-1].always {
				return fmt.Errorf("%v is behind %s:%d, which fits all", l, at.chain, i)
			}
		}
		if isEnd := l.num > len(c.rules); l.policy != (isEnd && c.policy != "") || l.end != (isEnd && c.policy == "") {
			return fmt.Errorf("%v: policy %v, end %v", l, l.policy, l.end)
		}
		at.num = l.num + 1
		target := "RETURN"
		if l.policy {
			target = c.policy
		} else if !l.end {
			rule := c.rules[l.num-1]
			if run.texts && l.text != rule.text {
				return fmt.Errorf("%v is %q, want %q", l, l.text, rule.text)
			}
			if target = rule.target; target == "mangle" {
				target = "ACCEPT"
				if _, option, ok := strings.Cut(rule.text, "--mangle-target "); ok {
					target = option
				}
			}
		}
		switch {
		case target == "ACCEPT" || target == "DROP" || target == "QUEUE":
			verdict = target
		case target == "RETURN" && len(stack) > 0:
			at, stack = stack[len(stack)-1], stack[:len(stack)-1]
		case target == "RETURN":
			at.num = len(c.rules) + 1
		case r.chains[target] != nil:
			at, stack = arpRule{target, 1}, append(stack, at)
		}
	}
	if verdict == "" || verdict != run.verdict {
		return fmt.Errorf("the verdict is %q, not %q", verdict, run.verdict)
	}
	return nil
}

// Wrong rules, too many and too few, in another order, with another text or verdict, and not
// resolved must be found; packets that come while counters are read must not be missed.
func TestTruthARPFindsPlantedErrors(t *testing.T) {
	listing := func(from int64, policy, one, two, user int) *arpReading {
		r, err := parseARPListing(fmt.Sprintf("Chain INPUT (policy DROP %d packets, 0 bytes)\n-j a -i * -o * --opcode 1 , pcnt=%d -- bcnt=0 \n"+
			"-j MARK -i * -o * --set-mark 5, pcnt=%d -- bcnt=0 \n\nChain OUTPUT (policy ACCEPT 0 packets, 0 bytes)\n\n"+
			"Chain a (1 references)\n-j RETURN ! -i eth0 -o * -s 10.0.0.1 , pcnt=%d -- bcnt=0 \n", policy, one, two, user))
		if err != nil {
			t.Fatal(err)
		}
		r.from, r.to = from, from+10
		return r
	}
	const object = `{"half_seen":"","lost":0,"steps":[{"kind":"table","netns_name":"h","time_ns":50,"family":"arp","hook":"INPUT","verdict":"DROP","table":{"name":"filter","engine":"xtables","unresolved":"",
"rules":[{"trace":"arp:filter:INPUT:rule:1","chain":"INPUT","number":1,"text":"-j a --opcode 1"},
{"trace":"arp:filter:a:rule:1","chain":"a","number":1,"text":"-j RETURN ! -i eth0 -s 10.0.0.1"},
{"trace":"arp:filter:INPUT:rule:2","chain":"INPUT","number":2,"text":"-j MARK --set-mark 5"},
{"trace":"arp:filter:INPUT:policy:3","chain":"INPUT","number":3,"is_policy":true,"text":""}]}}]}
`
	at := func(ns string) string { return strings.Replace(object, `"time_ns":50`, `"time_ns":`+ns, 1) }
	other := func(old, new string) string {
		if !strings.Contains(object, old) {
			t.Fatalf("nothing planted: %s", old)
		}
		return object + strings.Replace(object, old, new, 1)
	}
	good := []*arpReading{listing(0, 3, 9, 9, 4), listing(100, 5, 11, 11, 6), listing(200, 5, 11, 11, 6)}
	for name, tt := range map[string]struct {
		readings []*arpReading
		text     string
		ok       bool
	}{
		"the same":       {good, object + object, true},
		"too few":        {good, object, false},
		"too many":       {good, object + object + object, false},
		"none":           {good, "", false},
		"later":          {good, object + at("150"), false},
		"while read":     {good, object + at("105"), true},
		"before":         {good, object + at("5"), false},
		"number":         {good, other(`"number":2`, `"number":3`), false},
		"both numbers":   {good, other(`rule:2","chain":"INPUT","number":2`, `rule:3","chain":"INPUT","number":3`), false},
		"text":           {good, other("--opcode 1", "--opcode 2"), false},
		"no policy":      {good, other(`"is_policy":true`, `"is_policy":false`), false},
		"verdict":        {good, other(`"verdict":"DROP"`, `"verdict":"ACCEPT"`), false},
		"passed over":    {[]*arpReading{good[0], listing(100, 5, 11, 10, 6)}, other(`{"trace":"arp:filter:INPUT:rule:2","chain":"INPUT","number":2,"text":"-j MARK --set-mark 5"},`, ""), false},
		"order":          {good, other(`{"trace":"arp:filter:INPUT:rule:1","chain":"INPUT","number":1,"text":"-j a --opcode 1"},`, ""), false},
		"unresolved":     {good, other(`"unresolved":""`, `"unresolved":"why"`), false},
		"half seen":      {good, other(`"half_seen":""`, `"half_seen":"why"`), false},
		"lost":           {good, other(`"lost":0`, `"lost":1`), false},
		"another table":  {good, other(`"name":"filter"`, `"name":"nat"`), false},
		"another engine": {good, other(`"xtables"`, `"nf_tables"`), false},
	} {
		runs, _, err := arpRuns([]byte(tt.text), "arptables-legacy")
		if err == nil {
			err = compareARP(tt.readings, runs)
		}
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseARPListing("Chain INPUT (policy DROP 3 packets, 0 bytes)\nChain a (1 references)\nwhat\n"); err == nil {
		t.Error("a line that is none was taken for a rule")
	}
}
