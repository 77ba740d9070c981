package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/rulegen"
	"github.com/nftrace/nftrace/testenv/topo"
)

// An nftTruth is a truth for nf_tables: native rules, or those of a truth by way of
// iptables-nft and ip6tables-nft.
type nftTruth struct {
	truth
	// nft is input of nft -f; empty where v4 and v6 are the rules.
	nft string
	// hits are the lines that the traffic must meet, as oracle.NFTHits names them.
	hits []string
	// families are those besides inet in which the oracle marks packets, too.
	families []string
	// notOn says why a ruleset is left out, by the beginning of the kernel's release.
	notOn map[string]string
}

// notCompat has the rulesets of testdata/truth that are not for iptables-nft, and why.
var notCompat = map[string]string{
	"compat-new-table": "its traffic changes the legacy tables",
	"compat-replace":   "its traffic changes the legacy tables",
	"compat-zero":      "its traffic changes the legacy tables",
	"compat-synproxy":  "the kernel tells of packets that SYNPROXY has freed, by the number that the next at that address may have; nft/synproxy.txtar has it",
}

// parseNFTTruth reads a case of testdata/nft: see doc.go.
func parseNFTTruth(name string, data []byte) (*nftTruth, error) {
	c := &nftTruth{truth: truth{name: name}, notOn: map[string]string{}}
	for _, f := range txtar.Parse(data).Files {
		text := string(f.Data)
		kernel, not := strings.CutPrefix(f.Name, "not on ")
		var err error
		switch {
		case f.Name == "nft":
			c.nft, err = expand(text)
		case f.Name == "hits":
			c.hits, err = parseHits(text)
		case f.Name == "families":
			c.families = strings.Fields(text)
		case not:
			if c.notOn[kernel] = strings.TrimSpace(text); c.notOn[kernel] == "" {
				err = fmt.Errorf("not on %s, and no reason", kernel)
			}
		case f.Name == "v4" || f.Name == "v6":
			err = errors.New("rules of iptables are for testdata/truth")
		default:
			err = c.section(f.Name, text)
		}
		if err != nil {
			return nil, err
		}
	}
	if c.nft == "" || c.hits == nil {
		return nil, errors.New("want sections nft and hits")
	}
	return c, c.check()
}

// parseHits reads lines "FAMILY TABLE CHAIN NUMBER…"; a NUMBER may be "policy" or "end".
func parseHits(text string) (hits []string, err error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 4 {
			return nil, fmt.Errorf("%q: want FAMILY TABLE CHAIN NUMBER…", strings.TrimSpace(line))
		}
		for _, n := range f[3:] {
			if _, err := strconv.Atoi(n); err != nil && n != "policy" && n != "end" {
				return nil, fmt.Errorf("%q is not a number, policy or end", n)
			}
			hits = append(hits, strings.Join(append(f[:3:3], n), " "))
		}
	}
	return hits, nil
}

// nftTruths are the cases of TestTruthNFT.
func nftTruths(t *testing.T) []*nftTruth {
	t.Helper()
	cases := append(rulesets(t, "nft", 40, parseNFTTruth), rulesets(t, "truth", 40, func(name string, data []byte) (*nftTruth, error) {
		c, err := parseTruth(name, data)
		if err != nil {
			return nil, err
		}
		return compatTruth(c), nil
	})...)
	from, to := seeds(t)
	for seed := from; seed <= to; seed++ {
		cases = append(cases, &nftTruth{truth: truth{name: fmt.Sprintf("seed-%d", seed)}, nft: rulegen.NFT(seed)})
		c := compatTruth(randomTruth(seed))
		// A condition that is never met, which the kernel's xtables take and nf_tables do not.
		c.v6 = strings.NewReplacer(" ! -s ::/0", "", " ! -d ::/0", "").Replace(c.v6)
		cases = append(cases, c)
	}
	return some(t, "NFTRACE_NFT", slices.DeleteFunc(cases, func(c *nftTruth) bool { return notCompat[c.name] != "" }))
}

// compatTruth is a case for the legacy tables by way of iptables-nft.
func compatTruth(c *truth) *nftTruth {
	n := &nftTruth{truth: *c}
	n.name = "compat-" + c.name
	n.unresolved, n.replacements = "", 0 // of counters
	return n
}

// TestTruthNFT holds nftrace against the kernel's own trace of nf_tables, as TestTruth does
// for the legacy tables: rulesets of testdata/nft, those of testdata/truth by way of
// iptables-nft, and random ones. NFTRACE_TRUTH, NFTRACE_SEEDS and NFTRACE_KEEP are as there.
func TestTruthNFT(t *testing.T) {
	cases := nftTruths(t)
	needVM(t)
	if !knowsNFT(t) {
		t.Skip("nftrace does not know nf_tables")
	}
	runNFTTruths(t, cases, true)
}

// Without nftrace: every ruleset must load, and the traffic must meet the rules that it is
// there for.
func TestRulesetsNFT(t *testing.T) {
	cases := nftTruths(t)
	needVM(t)
	if knowsNFT(t) {
		t.Skip("TestTruthNFT does the same")
	}
	runNFTTruths(t, cases, false)
}

// knowsNFT tells whether the nftrace in PATH traces nf_tables.
func knowsNFT(t *testing.T) bool {
	t.Helper()
	path, err := exec.LookPath("nftrace")
	if err != nil {
		return false
	}
	out, err := exec.CommandContext(t.Context(), path, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(out, []byte("nf_tables"))
}

// runNFTTruths runs cases in one topology, with nftrace or without.
func runNFTTruths(t *testing.T, cases []*nftTruth, nftrace bool) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	up(t, "bare")
	shell(t.Context(), t, t.TempDir(), "setup", nil, truthSetup)
	var total tally
	run := func(c *nftTruth, w *watch) {
		ok := t.Run(c.name, func(t *testing.T) {
			for kernel, why := range c.notOn {
				if strings.HasPrefix(release, kernel) {
					t.Skipf("not on Linux %s: %s", kernel, why)
				}
			}
			packets, lines := runNFTTruth(t, c, nftrace, w)
			total.rulesets++
			total.packets += packets
			total.lines += lines
		})
		if !ok {
			total.failed++
		}
	}
	if nftrace {
		runTogether(t, cases, run, func(rest []byte) error { return compareNFT(nil, rest, "") }, "--format", "json")
	} else {
		for _, c := range cases {
			run(c, nil)
		}
	}
	t.Logf("compared: %d rulesets, %d packets, %d steps; %d rulesets differ", total.rulesets, total.packets, total.lines, total.failed)
}

// runNFTTruth returns the number of packets, and of lines that the kernel had for them. With
// nftrace, it is the one that is there or one of the case's own.
func runNFTTruth(t *testing.T, c *nftTruth, nftrace bool, w *watch) (packets, lines int) {
	// Far more than it takes: other things may run on the machine.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	compat := loadNFTTruth(ctx, t, c)
	// Connections of other cases would not see nat.
	exec.CommandContext(ctx, "ip", "netns", "exec", "h", "conntrack", "-F").Run()
	loaded := time.Now()
	o, err := oracle.StartNFT(ctx, "h", c.families...)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := o.Close(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	o.Ruleset.Compat = compat

	var runs []oracle.NFTRun
	check := func(out []byte) error {
		events, err := o.Events()
		if err != nil {
			return err
		}
		if runs, err = o.Ruleset.Runs(events); err != nil {
			return err
		}
		if dir := os.Getenv("NFTRACE_KEEP"); dir != "" {
			os.WriteFile(filepath.Join(dir, c.name+".nft"), []byte(c.nft), 0o644)
			os.WriteFile(filepath.Join(dir, c.name+".kernel"), []byte(oracle.FormatNFT(runs)), 0o644)
			os.WriteFile(filepath.Join(dir, c.name+".json"), out, 0o644)
		}
		if !nftrace {
			return nil
		}
		return compareNFT(runs, out, c.unresolved)
	}
	switch {
	case !nftrace:
		traffic(ctx, t, &c.truth)
		err = check(nil)
	case w != nil:
		traffic(ctx, t, &c.truth)
		err = w.take(check)
	default:
		out, stderr := traffic(ctx, t, &c.truth, "nftrace", "--format", "json")
		err = errors.Join(check(out), checkSummary(stderr, c.unresolved))
	}
	if err != nil {
		t.Error(err)
	}
	hits := oracle.NFTHits(runs)
	for _, n := range hits {
		lines += n
	}
	if o.Packets() == 0 || lines == 0 {
		t.Error("the kernel traced nothing")
	}
	for _, h := range c.hits {
		if hits[h] == 0 {
			t.Errorf("no packet met %s", h)
		}
	}
	t.Logf("%d packets, %d runs, %d lines; load %v, trace and check %v", o.Packets(), len(runs), lines,
		loaded.Sub(start).Round(time.Millisecond), time.Since(loaded).Round(time.Millisecond))
	return o.Packets(), lines
}

// loadNFTTruth loads the rules of a case and nothing else. It returns which tables are
// those of iptables-nft.
func loadNFTTruth(ctx context.Context, t *testing.T, c *nftTruth) map[string]bool {
	t.Helper()
	if err := topo.Load(ctx, "h", "nft", "flush ruleset\n"+c.nft); err != nil {
		t.Fatalf("%v\n%s", err, c.nft)
	}
	compat := map[string]bool{}
	for _, f := range []struct{ program, family, rules string }{{"iptables-nft", "ip", c.v4}, {"ip6tables-nft", "ip6", c.v6}} {
		if c.nft != "" {
			break
		}
		rules := restoreInput(f.rules, !c.fresh)
		if rules == "" {
			continue
		}
		if err := topo.Load(ctx, "h", f.program, rules); err != nil {
			t.Fatalf("%v\n%s", err, rules)
		}
		for _, b := range baseChains {
			compat[f.family+" "+b.table] = true
		}
	}
	return compat
}

// compareNFT holds nftrace's JSON against the kernel's runs.
func compareNFT(kernel []oracle.NFTRun, out []byte, cause string) error {
	tool, err := oracle.ParseNFT(bytes.NewReader(out), "h")
	if err != nil {
		return err
	}
	return oracle.CompareNFT(kernel, tool, cause)
}

// The comparison must not find what is not there: nftrace's journeys through the legacy
// tables are held against the kernel's through base chains beside them, as if they were
// those. So packets have one name on both sides, and alike packets, copies and fragments
// are paired as they should be.
func TestCompareNFT(t *testing.T) {
	needVM(t)
	if _, err := exec.LookPath("nftrace"); err != nil {
		t.Skip("no nftrace in PATH")
	}
	if knowsNFT(t) {
		t.Skip("TestTruthNFT does the same")
	}
	up(t, "bare")
	shell(t.Context(), t, t.TempDir(), "setup", nil, truthSetup)
	hooks := []string{"prerouting", "input", "forward", "output", "postrouting"}
	var rules strings.Builder
	for _, h := range hooks {
		fmt.Fprintf(&rules, "\tchain %s { type filter hook %s priority -151; }\n", h, h)
	}
	// Without conntrack, and so with fragments; with it; with copies.
	for _, rule := range []string{"", "-A PREROUTING -m conntrack --ctstate NEW\n", "-A PREROUTING -j TEE --gateway GATEWAY\n-A OUTPUT -j TEE --gateway GATEWAY\n"} {
		for p, gateway := range map[string]string{"iptables-legacy": "172.17.0.2", "ip6tables-legacy": "fd00:17::2"} {
			if err := topo.Load(t.Context(), "h", p, "*mangle\n-F\n"+strings.ReplaceAll(rule, "GATEWAY", gateway)+"COMMIT\n"); err != nil {
				t.Fatal(err)
			}
		}
		if err := topo.Load(t.Context(), "h", "nft", "flush ruleset\ntable inet t {\n"+rules.String()+"}\n"); err != nil {
			t.Fatal(err)
		}
		o, err := oracle.StartNFT(t.Context(), "h")
		if err != nil {
			t.Fatal(err)
		}
		out, _ := traffic(t.Context(), t, &truth{}, "nftrace", "--format", "json")
		events, err := o.Events()
		if err != nil {
			t.Fatal(err)
		}
		if err := o.Close(t.Context()); err != nil {
			t.Error(err)
		}
		runs, err := o.Ruleset.Runs(events)
		if err != nil {
			t.Fatal(err)
		}
		if len(runs) < 200 {
			t.Errorf("only %d runs", len(runs))
		}
		out = bytes.ReplaceAll(out, []byte(`"table":{"name":"mangle",`), []byte(`"table":{"name":"mangle","engine":"nf_tables",`))
		journeys, err := oracle.ParseNFT(bytes.NewReader(out), "h")
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range journeys {
			for i := range j.Runs {
				r := &j.Runs[i]
				r.Family, r.Table, r.Chain, r.Verdict = "inet", "t", strings.ToLower(r.Hook), "ACCEPT"
				r.Rules = []oracle.NFTRule{{Trace: "inet:t:" + r.Chain + ":policy:1", Chain: r.Chain, Type: "policy", Number: 1, IsPolicy: true, Action: "ACCEPT"}}
			}
		}
		if err := oracle.CompareNFT(runs, journeys, ""); err != nil {
			t.Errorf("%q: %v", rule, err)
		}
	}
}

// What a case claims must be read as it stands, and nothing else be taken for a case.
func TestParseNFTTruth(t *testing.T) {
	const rules = "-- nft --\ntable ip t { }\n"
	c, err := parseNFTTruth("x", []byte(rules+"-- hits --\nip t c 1 policy\n-- families --\nbridge arp\n-- not on 6.1 --\nbecause\n"))
	if err != nil || !slices.Equal(c.hits, []string{"ip t c 1", "ip t c policy"}) || len(c.families) != 2 || c.notOn["6.1"] != "because" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"no hits":         rules,
		"no rules":        "-- hits --\nip t c 1\n",
		"a short hit":     rules + "-- hits --\nip t 1\n",
		"no number":       rules + "-- hits --\nip t c x\n",
		"legacy rules":    rules + "-- hits --\nip t c 1\n-- v4 --\n*filter\n",
		"another section": rules + "-- hits --\nip t c 1\n-- hit --\n",
		"alone":           rules + "-- hits --\nip t c 1\n-- alone --\n",
		"no reason":       rules + "-- hits --\nip t c 1\n-- not on 6.1 --\n",
		"not yet":         rules + "-- hits --\nip t c 1\n-- not yet --\nbecause\n",
	} {
		if _, err := parseNFTTruth("x", []byte(text)); err == nil {
			t.Errorf("%s: taken for a case", name)
		}
	}
}

// What nftrace says of itself counts, too.
func TestCheckSummary(t *testing.T) {
	const fine = "nftrace: 3 packets, 99 records, 0 lost, 0 unresolved\n"
	if err := checkSummary(fine, ""); err != nil {
		t.Fatal(err)
	}
	unresolved := strings.Replace(fine, "0 unresolved", "2 unresolved", 1)
	if err := checkSummary(unresolved, "some cause"); err != nil {
		t.Error(err)
	}
	for name, stderr := range map[string]string{
		"lost":       strings.Replace(fine, "0 lost", "1 lost (1 records: buffer full)", 1),
		"unresolved": unresolved,
		"no summary": "nftrace: something\n",
	} {
		if err := checkSummary(stderr, ""); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
	if err := compareNFT(nil, []byte("{"), ""); err == nil {
		t.Error("half an object was taken for JSON")
	}
}

// A packet waits for an answer of ARP, behind its last hook, where nf_tables has nothing, and it is
// another CPU that lets it go. What that one has skipped says nothing of the packet.
func TestNeighbourOnAnotherCPU(t *testing.T) {
	needNftrace(t)
	if runtime.NumCPU() == 1 {
		t.Skip("needs two CPUs")
	}
	up(t, "bare")
	if err := topo.Load(t.Context(), "h", "nft", "table ip t { chain c { type filter hook output priority 0; counter accept; }; }\n"); err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{"h", "ext"} {
		sh(t, fmt.Sprintf("ip netns exec %s sh -c 'for q in /sys/class/net/*/queues/rx-0/rps_cpus; do echo 2 >$q; done'", ns))
	}
	const n = 13
	p := attached(t, "h", nil, "--format", "json", "--netns", "h", "udp")
	sh(t, fmt.Sprintf(`
for i in $(seq %d); do
	ip -n h neigh del 10.211.55.1 dev eth0
	ip netns exec h taskset 1 traffic udp-send -n 1 10.211.55.1:9
done
`, n))
	p.signal(syscall.SIGINT)
	p.want(0)
	waited := 0
	for _, o := range objects(t, p.stdout.String(), false) {
		if o["lost"] != 0. || o["half_seen"] != "" {
			t.Errorf("a packet has lost %v, half seen %q", o["lost"], o["half_seen"])
		}
		for _, s := range o["steps"].([]any) {
			if step := s.(map[string]any); step["kind"] == "xmit" && step["cpu"] == 1. {
				waited++
			}
		}
	}
	if p.summary() != n || waited == 0 {
		t.Errorf("%d packets, want %d; %d were let go by the other CPU, want one or more: %s", p.summary(), n, waited, p.stderr.String())
	}
}
