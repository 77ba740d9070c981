package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/rulegen"
)

// A truth is a ruleset with the traffic that it meets. What nftrace says of it must
// be what the kernel says, line for line.
type truth struct {
	name string
	// v4 and v6 are input of iptables-restore and ip6tables-restore: the rules of
	// namespace h. Tables and policies that they do not name are empty and ACCEPT.
	v4, v6 string
	// traffic is a script of testenv/cmd/traffic, run after mixedTraffic unless alone.
	traffic string
	alone   bool
	// fresh cases have a topology of their own, with the tables that they name alone:
	// nothing is tracked or reassembled there unless their rules want that.
	fresh bool
	// own is why the case needs an nftrace of its own.
	own  string
	args []string // of nftrace
	// unresolved is the cause for which runs of tables may stay unresolved: in
	// rulesets that are there to show just that. All else must be right.
	unresolved string
	// replacements is how often the traffic has a table replaced, under which a packet
	// on another CPU may be: see replacedUnder.
	replacements int
}

// mixedTraffic is something of everything. Rules may drop, turn or reject any of it.
const mixedTraffic = `
serve c1 tcp-serve :80
serve c1 udp-echo :7
serve ext tcp-serve :80
serve ext udp-echo :7
serve h tcp-serve :80
serve h udp-echo :7
- c2 raw -proto icmp -n 2 -sport 301 -id 101 172.17.0.2
- c2 raw -proto icmp -n 2 -sport 302 -id 111 10.211.55.1
- c2 raw -proto icmp -n 2 -sport 303 fd00:17::2
- c2 raw -proto icmp -n 2 -sport 304 fd00:55::1
- h raw -proto icmp -n 2 -sport 305 -id 121 172.17.0.2
- h raw -proto icmp -n 2 -sport 306 127.0.0.1
- ext raw -proto icmp -n 2 -sport 307 -id 131 10.211.55.8
- c2 tcp-get -size 3000 -timeout 300ms 172.17.0.2:80
- c2 tcp-get -timeout 300ms 10.211.55.1:80
- c2 tcp-get -timeout 300ms [fd00:55::1]:80
- c2 tcp-get -timeout 300ms 172.17.0.1:80
- ext tcp-get -timeout 300ms 10.211.55.8:80
- ext tcp-get -timeout 300ms 10.211.55.8:8080
- h tcp-get -timeout 300ms 172.17.0.2:80
- c2 udp-send -n 2 -reply -timeout 100ms 172.17.0.2:7
- c2 udp-send -n 2 -reply -timeout 100ms [fd00:17::2]:7
- c2 udp-send -n 2 -reply -timeout 100ms 10.211.55.1:7
- h udp-send -n 2 -reply -timeout 100ms [fd00:55::1]:7
- c2 udp-send -n 3 172.17.0.2:12345
- c2 udp-send -n 3 [fd00:55::1]:53
- ext udp-send -n 3 10.211.55.8:8080
- h udp-send -n 3 10.211.55.1:80
- h udp-send -n 2 127.0.0.1:9
- c2 frag -n 2 10.211.55.1:53
- c2 frag -n 2 [fd00:17::2]:53
- h frag -n 1 172.17.0.2:53
- c2 raw -n 3 -flags SYN -id 1000 172.17.0.2:81
- ext raw -n 3 -flags FIN,PSH,URG -id 1100 10.211.55.8:12345
- c2 raw -n 2 -proto udp -options rr -id 2000 10.211.55.1:53
- c2 raw -n 2 -proto udp -options ts -id 2100 172.17.0.1:53
- c2 raw -n 3 [fd00:17::2]:81
- h raw -n 3 -flags ACK -id 3000 172.17.0.2:81
`

// truthSetup makes the outside know the containers' network, so that they get
// answers without NAT, and sends no SYN+ACK again, nor words about fragments that never came,
// after a case has ended.
var truthSetup = `
ip -n ext route add 172.17.0.0/16 via 10.211.55.8
for ns in h c1 c2 ext; do ip netns exec $ns sh -c 'echo 0 > /proc/sys/net/ipv4/tcp_synack_retries'; done
` + holdFragments(heldForGood)

// heldForGood is longer than a test.
const heldForGood = 3600

// holdFragments are shell lines that set how many seconds new fragments wait for others.
func holdFragments(seconds int) string {
	return fmt.Sprintf(`for ns in h c1 c2 ext; do ip netns exec $ns sh -c '
	echo %d | tee /proc/sys/net/ipv4/ipfrag_time > /proc/sys/net/ipv6/ip6frag_time'; done
`, seconds)
}

// baseChains are the tables of each family, and their chains.
var baseChains = []struct{ table, chains string }{
	{"raw", "PREROUTING OUTPUT"},
	{"mangle", "PREROUTING INPUT FORWARD OUTPUT POSTROUTING"},
	{"nat", "PREROUTING INPUT OUTPUT POSTROUTING"},
	{"filter", "INPUT FORWARD OUTPUT"},
	{"security", "INPUT FORWARD OUTPUT"},
}

// restoreInput completes rules: every table (if all is set), every chain's policy.
func restoreInput(rules string, all bool) string {
	tables := map[string]string{}
	name := ""
	for line := range strings.Lines(rules) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line == "COMMIT" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "*"):
			name = line[1:]
			tables[name] += ""
		default:
			tables[name] += line + "\n"
		}
	}
	var b strings.Builder
	for _, t := range baseChains {
		text, ok := tables[t.table]
		if !ok && !all {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", t.table)
		for c := range strings.FieldsSeq(t.chains) {
			if !strings.Contains(text, ":"+c+" ") {
				fmt.Fprintf(&b, ":%s ACCEPT [0:0]\n", c)
			}
		}
		fmt.Fprintf(&b, "%sCOMMIT\n", text)
	}
	return b.String()
}

// parseTruth reads a case. Its sections are v4, v6 and traffic; args, alone, fresh, own,
// unresolved and replacements: see truth.
func parseTruth(name string, data []byte) (*truth, error) {
	c := &truth{name: name}
	var err error
	for _, f := range txtar.Parse(data).Files {
		if err := c.section(f.Name, string(f.Data)); err != nil {
			return nil, err
		}
	}
	if c.v4 == "" && c.v6 == "" {
		return nil, errors.New("neither v4 nor v6: no rules")
	}
	if c.v4, err = expand(c.v4); err != nil {
		return nil, err
	}
	if c.v6, err = expand(c.v6); err != nil {
		return nil, err
	}
	return c, c.check()
}

// section reads one section of a case.
func (c *truth) section(name, text string) (err error) {
	switch name {
	case "v4":
		c.v4 = text
	case "v6":
		c.v6 = text
	case "traffic":
		c.traffic = text
	case "args":
		c.args = strings.Fields(text)
	case "alone":
		c.alone = true
	case "fresh":
		c.fresh = true
	case "own":
		if c.own = strings.TrimSpace(text); c.own == "" {
			return errors.New("own, and no reason")
		}
	case "unresolved":
		c.unresolved = strings.TrimSpace(text)
	case "replacements":
		c.replacements, err = strconv.Atoi(strings.TrimSpace(text))
	default:
		return fmt.Errorf("no such section: %q", name)
	}
	return err
}

func (c *truth) check() error {
	if c.alone && c.traffic == "" {
		return errors.New("alone, and no traffic")
	}
	return nil
}

// expand writes a line "@300 text with %d" as 300 lines, numbered from 1.
func expand(rules string) (string, error) {
	var b strings.Builder
	for line := range strings.Lines(rules) {
		times, text, ok := strings.Cut(line, " ")
		if !strings.HasPrefix(line, "@") || !ok {
			b.WriteString(line)
			continue
		}
		n, err := strconv.Atoi(times[1:])
		if err != nil {
			return "", fmt.Errorf("%q: want @NUMBER TEXT", line)
		}
		for i := range n {
			b.WriteString(strings.ReplaceAll(text, "%d", strconv.Itoa(i+1)))
		}
	}
	return b.String(), nil
}

// randomTruth makes a case of a seed.
func randomTruth(seed uint64) *truth {
	return &truth{
		name: fmt.Sprintf("seed-%d", seed),
		v4:   rulegen.Generate(seed, rulegen.Options{}),
		v6:   rulegen.Generate(seed, rulegen.Options{IPv6: true}),
	}
}

// seeds are those of NFTRACE_SEEDS, "from-to" or one; the default is a few.
func seeds(t *testing.T) (from, to uint64) {
	from, to = 1, 3
	if s := os.Getenv("NFTRACE_SEEDS"); s != "" {
		a, b, ok := strings.Cut(s, "-")
		if !ok {
			b = a
		}
		var err1, err2 error
		from, err1 = strconv.ParseUint(a, 10, 64)
		to, err2 = strconv.ParseUint(b, 10, 64)
		if err1 != nil || err2 != nil {
			t.Fatalf("NFTRACE_SEEDS=%s: want a number or a range, as 1-20", s)
		}
	}
	return from, to
}

// TestTruth holds nftrace against the kernel's own TRACE: every line of every packet,
// in every ruleset of testdata/truth and in random ones, must be the same. With
// NFTRACE_TRUTH=1/2 every second ruleset is left out, with 2/2 the others; NFTRACE_SEEDS asks for
// more. NFTRACE_KEEP names a directory for each ruleset and what kernel and nftrace said of its
// packets.
func TestTruth(t *testing.T) {
	var shared, fresh []*truth
	for _, c := range rulesets(t, "truth", 40, parseTruth) {
		if c.fresh {
			fresh = append(fresh, c)
		} else {
			shared = append(shared, c)
		}
	}
	from, to := seeds(t)
	for seed := from; seed <= to; seed++ {
		shared = append(shared, randomTruth(seed))
	}
	shared = some(t, "NFTRACE_TRUTH", shared)
	needVM(t)
	if _, err := exec.LookPath("nftrace"); err != nil {
		t.Skip("no nftrace in PATH")
	}

	var total tally
	// One topology and one oracle for nearly all.
	t.Run("shared", func(t *testing.T) {
		up(t, "bare")
		truthRun(t, shared, &total)
	})
	t.Run("fresh", func(t *testing.T) {
		for _, c := range fresh {
			t.Run(c.name, func(t *testing.T) {
				up(t, "bare")
				truthRun(t, []*truth{c}, &total)
			})
		}
	})
	t.Logf("compared: %d rulesets, %d packets, %d lines; %d rulesets differ", total.rulesets, total.packets, total.lines, total.failed)
}

// rulesets returns those of a folder of testdata, of which there are to be some number at least.
func rulesets[T any](t *testing.T, dir string, least int, parse func(name string, data []byte) (T, error)) []T {
	t.Helper()
	files, err := filepath.Glob("testdata/" + dir + "/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < least {
		t.Errorf("testdata/%s: only %d files", dir, len(files))
	}
	var all []T
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		c, err := parse(strings.TrimSuffix(filepath.Base(f), ".txtar"), data)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all = append(all, c)
	}
	return all
}

// some returns the k-th of n parts of the cases where variable says "k/n", and all where it is
// not set: of each n in a row, one.
func some[T any](t *testing.T, variable string, cases []T) []T {
	t.Helper()
	value := os.Getenv(variable)
	if value == "" {
		return cases
	}
	part, of, _ := strings.Cut(value, "/")
	k, err1 := strconv.Atoi(part)
	n, err2 := strconv.Atoi(of)
	if err1 != nil || err2 != nil || k < 1 || k > n {
		t.Fatalf("%s=%s: want 1/2, 2/2, 1/3 …", variable, value)
	}
	var out []T
	for i := k - 1; i < len(cases); i += n {
		out = append(out, cases[i])
	}
	return out
}

type tally struct{ rulesets, packets, lines, failed int }

// needsOwn tells that the case is not for an nftrace that has seen others before it: it has
// flags of its own, a topology of its own, or runs that may be unresolved, which the summary counts.
func (c *truth) needsOwn() bool {
	return c.fresh || c.own != "" || c.args != nil || c.unresolved != "" || c.replacements > 0
}

// truthRun runs cases in the topology that is up: those that can be together under one
// nftrace, then the others.
func truthRun(t *testing.T, cases []*truth, total *tally) {
	shell(t.Context(), t, t.TempDir(), "setup", nil, truthSetup)
	o, err := oracle.Start(t.Context(), "h")
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(context.WithoutCancel(t.Context()))
	kernel := &kernelLines{o: o}
	run := func(c *truth, w *watch) {
		t.Run(c.name, func(t *testing.T) {
			packets, lines := runTruth(t, c, kernel, w)
			total.rulesets++
			total.packets += packets
			total.lines += lines
			if t.Failed() {
				total.failed++
			}
		})
	}
	runTogether(t, cases, run, func(rest []byte) error {
		lines, err := kernel.more()
		if err != nil {
			return err
		}
		return compareTrace(lines, oracle.Without(string(rest)), "")
	}, "--format", "trace")
}

// kernelLines are an oracle's lines, case by case.
type kernelLines struct {
	o     *oracle.Oracle
	taken int
}

// more returns the lines since the last next.
func (k *kernelLines) more() ([]string, error) {
	lines, err := k.o.Lines()
	if err != nil {
		return nil, err
	}
	return lines[k.taken:], nil
}

// next leaves what lines there are by now to the case that ends.
func (k *kernelLines) next(lines []string) { k.taken += len(lines) }

// skip leaves what lines there are by now to nobody.
func (k *kernelLines) skip() error {
	lines, err := k.more()
	k.next(lines)
	return err
}

// runTruth runs one case, under the nftrace that is there or one of its own.
func runTruth(t *testing.T, c *truth, kernel *kernelLines, w *watch) (npackets, nlines int) {
	// Far more than it takes: other things may run on the machine.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	for _, f := range []struct{ program, rules string }{{"iptables-legacy", c.v4}, {"ip6tables-legacy", c.v6}} {
		rules := restoreInput(f.rules, !c.fresh)
		if rules == "" {
			continue
		}
		// Without --noflush: what other cases left is gone.
		cmd := exec.CommandContext(ctx, "ip", "netns", "exec", "h", f.program+"-restore", "--wait")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s-restore: %v: %s\n%s", f.program, err, out, rules)
		}
	}
	if !c.fresh {
		// Connections of other cases would not see nat.
		exec.CommandContext(ctx, "ip", "netns", "exec", "h", "conntrack", "-F").Run()
	}
	loaded := time.Now()

	var lines []string
	var packets []oracle.Packet
	check := func(data []byte) (err error) {
		if lines, err = kernel.more(); err != nil {
			return err
		}
		if packets, err = oracle.Packets(lines); err != nil {
			return err
		}
		if len(packets) == 0 {
			return errors.New("the kernel traced nothing")
		}
		keepTruth(c, lines, data)
		data = []byte(oracle.Without(string(data)))
		if runtime.NumCPU() > 1 {
			var n int
			if data, n = sameOwners(lines, data); n > maxOwners {
				return fmt.Errorf("%d received packets have another owner than the kernel says; accept and close on another CPU explain %d", n, maxOwners)
			}
		}
		return compareTrace(lines, string(data), c.cause(data))
	}
	var err error
	if w != nil {
		traffic(ctx, t, c)
		err = w.take(check)
	} else {
		if err := kernel.skip(); err != nil {
			t.Fatal(err)
		}
		out, stderr := traffic(ctx, t, c, "nftrace", "--format", "trace")
		err = errors.Join(check(out), checkSummary(stderr, c.cause(out)))
	}
	if err != nil {
		t.Error(err)
	}
	kernel.next(lines)
	t.Logf("%d packets, %d lines; load %v, trace and check %v", len(packets), len(lines),
		loaded.Sub(start).Round(time.Millisecond), time.Since(loaded).Round(time.Millisecond))
	return len(packets), len(lines)
}

// cause is why runs of the case may be unresolved in nftrace's output.
func (c *truth) cause(out []byte) string {
	if n := replacedUnder(out); n > 0 && n <= c.replacements*(runtime.NumCPU()-1) {
		return replacedCause
	}
	return c.unresolved
}

// keepTruth writes what kernel and nftrace said of a case, and its rules, where NFTRACE_KEEP says.
func keepTruth(c *truth, lines []string, out []byte) {
	dir := os.Getenv("NFTRACE_KEEP")
	if dir == "" {
		return
	}
	os.WriteFile(filepath.Join(dir, c.name+".v4"), []byte(restoreInput(c.v4, !c.fresh)), 0o644)
	os.WriteFile(filepath.Join(dir, c.name+".v6"), []byte(restoreInput(c.v6, !c.fresh)), 0o644)
	os.WriteFile(filepath.Join(dir, c.name+".kernel"), []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	os.WriteFile(filepath.Join(dir, c.name+".nftrace"), out, 0o644)
}

// traffic sends a case's traffic, under a tool with flags as nftrace has them if there is
// one, and returns what that wrote to its output and to standard error.
func traffic(ctx context.Context, t *testing.T, c *truth, tool ...string) (out []byte, stderr string) {
	t.Helper()
	tmp := t.TempDir()
	script, file := filepath.Join(tmp, "traffic"), filepath.Join(tmp, "out")
	lines := c.traffic
	if !c.alone {
		lines = mixedTraffic + c.traffic
	}
	if err := os.WriteFile(script, []byte(lines), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"traffic", "script", script}
	if tool != nil {
		args = slices.Concat(tool, []string{"-o", file}, c.args, []string{"--"}, args)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "TMP="+tmp)
	text, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(text), "the command ended: ") {
		t.Fatalf("%s: %v\n%s", args[0], err, text)
	}
	if tool != nil {
		if out, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	return out, string(text)
}

// maxOwners bounds how often a race over a socket's owner is believed in a ruleset.
const maxOwners = 5

const replacedCause = "the table was replaced while the packet was in it"

// replacedUnder counts the packets under which a table was replaced, as nftrace has it. That
// happens on another CPU between their entry into the hook and the table's turn, and nobody
// can tell from counters which of the two tables they met. So a replacement can have one such
// packet on each other CPU, and none where there is one CPU.
func replacedUnder(out []byte) int {
	packets := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if m := unresolvedLine.FindStringSubmatch(line); m == nil || !strings.HasSuffix(m[1], replacedCause) {
			continue
		}
		if l, err := oracle.ParseLine(line); err == nil {
			packets[l.Packet] = true
		}
	}
	return len(packets)
}

// sameOwners is oracle.SameOwners over nftrace's output.
func sameOwners(kernel []string, out []byte) ([]byte, int) {
	lines, n := oracle.SameOwners(kernel, slices.Collect(strings.Lines(string(out))))
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(strings.TrimRight(l, "\n") + "\n")
	}
	return []byte(b.String()), n
}

var strayMAC = regexp.MustCompile(`(:POSTROUTING:\S+ IN=eth0 OUT=eth0 MAC=)[0-9a-f:]+ `)

// withoutStrayMAC drops what 6.18.15's dump_mac_header prints of a packet that has no header of
// the link layer yet, copies that TEE made: what lies 65,535 bytes behind the start of its
// memory. 6.12.117 and 7.3 print nothing. No other packet of these tests leaves through
// eth0 and says that it came in there.
func withoutStrayMAC(kernel []string) []string {
	out := make([]string, len(kernel))
	for i, line := range kernel {
		out[i] = strayMAC.ReplaceAllString(line, "$1 ")
	}
	return out
}

// compareTruth holds what nftrace printed against the kernel's lines, and its last
// words against what ordinary traffic must not have: losses, unresolved runs.
func compareTruth(kernel []string, out, stderr, cause string) error {
	return errors.Join(compareTrace(kernel, out, cause), checkSummary(stderr, cause))
}

// checkSummary finds losses in nftrace's last words, and unresolved runs if there is no cause.
func checkSummary(stderr, cause string) error {
	switch s, err := parseSummary(stderr); {
	case err != nil:
		return err
	case s.lost != 0 || s.unresolved != 0 && cause == "":
		return fmt.Errorf("%d lost, %d unresolved, want none: %s", s.lost, s.unresolved, s.line)
	}
	return nil
}

// compareTrace holds lines of --format trace against the kernel's.
//
// Where a cause is given, runs may be unresolved for that cause: what the kernel says
// of these runs is left out of the comparison.
func compareTrace(kernel []string, out, cause string) error {
	var tool, half []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "# nftrace:") {
			half = append(half, strings.TrimSpace(line))
			continue
		}
		tool = append(tool, line)
	}
	kernel = withoutStrayMAC(withoutReports(kernel, tool))
	var errs []error
	if half != nil {
		slices.Sort(half)
		errs = append(errs, fmt.Errorf("%d packets were not seen whole: %s", len(half), strings.Join(slices.Compact(half), "; ")))
	}
	if cause != "" {
		var err error
		if kernel, tool, err = withoutUnresolved(kernel, tool, cause); err != nil {
			return err
		}
	} else if s := causes(tool); s != "" {
		errs = append(errs, fmt.Errorf("unresolved:\n%s", s))
	}
	return errors.Join(append(errs, oracle.Compare(kernel, tool))...)
}

// withoutReports takes multicast reports (MLD) that nftrace does not have from both ends of
// what the kernel traced. The kernel sends them when it likes, and may have done so before
// nftrace was attached or when it had ended, when no test sends anything.
func withoutReports(kernel, tool []string) []string {
	seen := map[string]bool{}
	for _, line := range tool {
		if l, err := oracle.ParseLine(line); err == nil {
			seen[l.Packet] = true
		}
	}
	unseen := func(line string) bool {
		l, err := oracle.ParseLine(line)
		return err == nil && strings.Contains(line, " PROTO=ICMPv6 TYPE=143 ") && !seen[l.Packet]
	}
	for len(kernel) > 0 && unseen(kernel[0]) {
		kernel = kernel[1:]
	}
	for len(kernel) > 0 && unseen(kernel[len(kernel)-1]) {
		kernel = kernel[:len(kernel)-1]
	}
	return kernel
}

// withoutUnresolved takes the unresolved runs away from both sides: there must be some.
func withoutUnresolved(kernel, tool []string, cause string) (k, t []string, err error) {
	runs := map[string]bool{}
	key := func(line string) (string, error) {
		l, err := oracle.ParseLine(line)
		table, _, _ := strings.Cut(l.Rule, ":")
		return table + " " + l.Packet, err
	}
	for _, line := range tool {
		m := unresolvedLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if !strings.Contains(m[1], cause) {
			return nil, nil, fmt.Errorf("unresolved for another cause than %q: %s", cause, line)
		}
		k, err := key(line)
		if err != nil {
			return nil, nil, err
		}
		runs[k] = true
	}
	if len(runs) == 0 {
		return nil, nil, fmt.Errorf("no run was unresolved for %q: take the section away", cause)
	}
	for _, side := range []struct {
		from []string
		to   *[]string
	}{{kernel, &k}, {tool, &t}} {
		for _, line := range side.from {
			name, err := key(line)
			if err != nil {
				return nil, nil, err
			}
			if !runs[name] {
				*side.to = append(*side.to, line)
			}
		}
	}
	return k, t, nil
}

var unresolvedLine = regexp.MustCompile(`^TRACE: (\S+:unresolved: .*?) IN=`)

// causes counts the unresolved runs by table, hook and cause.
func causes(tool []string) string {
	count := map[string]int{}
	for _, line := range tool {
		if m := unresolvedLine.FindStringSubmatch(line); m != nil {
			count[m[1]]++
		}
	}
	var b strings.Builder
	for _, c := range slices.Sorted(maps.Keys(count)) {
		fmt.Fprintf(&b, "%5d× %s\n", count[c], c)
	}
	return b.String()
}

// a summary is nftrace's last line on stderr.
type summary struct {
	line                               string
	packets, records, lost, unresolved uint64
}

var summaryLine = regexp.MustCompile(`(?m)^nftrace: (\d+) packets, (\d+) records, (\d+) lost(?: \(.*\))?, (\d+) unresolved`)

func parseSummary(stderr string) (s summary, err error) {
	all := summaryLine.FindAllStringSubmatch(stderr, -1)
	if all == nil {
		return s, fmt.Errorf("nftrace did not say how it went:\n%s", stderr)
	}
	m := all[len(all)-1]
	s.line = m[0]
	for i, p := range []*uint64{&s.packets, &s.records, &s.lost, &s.unresolved} {
		if *p, err = strconv.ParseUint(m[i+1], 10, 64); err != nil {
			return s, err
		}
	}
	return s, nil
}

// One wrong rule number in what nftrace printed must fail the comparison, and so must
// a hole, a loss and an unresolved run.
func TestTruthFindsPlantedErrors(t *testing.T) {
	data, err := os.ReadFile("testdata/truth.trace")
	if err != nil {
		t.Fatal(err)
	}
	good := string(data)
	kernel := strings.Split(strings.TrimSpace(good), "\n")
	const fine = "nftrace: 3 packets, 99 records, 0 lost, 0 unresolved\n"
	if err := compareTruth(kernel, good, fine, ""); err != nil {
		t.Fatalf("the same lines: %v", err)
	}
	const report = "TRACE: raw:OUTPUT:policy:1 IN= OUT=docker0 SRC=fe80:0000:0000:0000:0000:acff:fe11:0001 " +
		"DST=ff02:0000:0000:0000:0000:0000:0000:0016 LEN=156 TC=0 HOPLIMIT=1 FLOWLBL=0 OPT ( ) PROTO=ICMPv6 TYPE=143 CODE=0 "
	other := strings.Replace(report, "TYPE=143", "TYPE=135", 1)
	for name, tt := range map[string]struct {
		kernel []string
		tool   string
		fine   bool
	}{
		"report before":            {slices.Concat([]string{report}, kernel), good, true},
		"reports behind":           {slices.Concat(kernel, []string{report, report}), good, true},
		"report between":           {slices.Concat(kernel[:1], []string{report}, kernel[1:]), good, false},
		"no report":                {slices.Concat([]string{other}, kernel), good, false},
		"one report of two":        {slices.Concat([]string{report}, kernel, []string{report}), report + "\n" + good, false},
		"report that is nftrace's": {kernel, report + "\n" + good, false},
	} {
		if err := compareTruth(tt.kernel, tt.tool, fine, ""); (err == nil) != tt.fine {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Each line in turn gets a wrong number, then another type, then goes.
	number := regexp.MustCompile(`:(\d+) IN=`)
	for i, line := range kernel {
		for name, wrong := range map[string]string{
			"number": number.ReplaceAllStringFunc(line, func(s string) string {
				n, _ := strconv.Atoi(s[1 : len(s)-len(" IN=")])
				return fmt.Sprintf(":%d IN=", n+1)
			}),
			"type": strings.NewReplacer(":rule:", ":return:", ":policy:", ":rule:", ":return:", ":rule:").Replace(line),
			"gone": "",
		} {
			if wrong == line {
				t.Fatalf("line %d, %s: nothing planted", i, name)
			}
			lines := slices.Clone(kernel)
			lines[i] = wrong
			if wrong == "" {
				lines = slices.Delete(lines, i, i+1)
			}
			if err := compareTruth(kernel, strings.Join(lines, "\n"), fine, ""); err == nil {
				t.Errorf("line %d, %s: not found", i+1, name)
			}
		}
	}
	for name, tt := range map[string]struct{ out, stderr string }{
		"half seen":  {"# nftrace: half seen: x\n" + good, fine},
		"lost":       {good, strings.Replace(fine, "0 lost", "1 lost (1 records: buffer full)", 1)},
		"unresolved": {good, strings.Replace(fine, "0 unresolved", "2 unresolved", 1)},
		"no summary": {good, "nftrace: something\n"},
	} {
		if err := compareTruth(kernel, tt.out, tt.stderr, ""); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

// Of packets under which a table was replaced the other tables are still compared.
func TestReplacedUnder(t *testing.T) {
	data, err := os.ReadFile("testdata/truth.trace")
	if err != nil {
		t.Fatal(err)
	}
	good := string(data)
	kernel := strings.Split(strings.TrimSpace(good), "\n")
	replaced := strings.Replace(good, " mangle:FORWARD:policy:1 ", " mangle:FORWARD:unresolved: "+replacedCause+" ", 1)
	for name, tt := range map[string]struct {
		out  string
		want int
	}{
		"none":    {good, 0},
		"one":     {replaced, 1},
		"another": {strings.Replace(replaced, replacedCause, "others ran through the tables unseen", 1), 0},
	} {
		if n := replacedUnder([]byte(tt.out)); n != tt.want {
			t.Errorf("%s: %d packets, want %d", name, n, tt.want)
		}
	}
	const fine = "nftrace: 3 packets, 99 records, 0 lost, 1 unresolved\n"
	if err := compareTruth(kernel, replaced, fine, replacedCause); err != nil {
		t.Error(err)
	}
	wrong := strings.Replace(replaced, "filter:FORWARD:rule:1 ", "filter:FORWARD:rule:2 ", 1)
	if err := compareTruth(kernel, wrong, fine, replacedCause); err == nil {
		t.Error("a wrong rule of such a packet was not found")
	}
}
