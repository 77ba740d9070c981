package e2e

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/topo"
)

const (
	interleaveRules = 400   // of OUTPUT, and 100 of FORWARD
	interleavePort  = 20000 // rule N is for port 20000+N
	echoPort        = interleavePort + interleaveRules
)

// interleaveRuleset has one rule for each flow and no verdict: the number of the rule
// that a packet matched is told by its port, so that no wrong one can hide.
func interleaveRuleset() string {
	var b strings.Builder
	b.WriteString("*filter\n")
	for i := range interleaveRules - 1 {
		fmt.Fprintf(&b, "-A OUTPUT -p udp -m udp --dport %d\n", interleavePort+1+i)
	}
	fmt.Fprintf(&b, "-A OUTPUT -p udp -m udp --sport %d\n", echoPort)
	for i := range 100 {
		fmt.Fprintf(&b, "-A FORWARD -p udp -m udp --dport %d\n", interleavePort+1+i)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// interleaveTraffic makes calls of ipt_do_table for one table overlap on one CPU.
// Forwarded packets arrive on it (RPS), in softirqs of the senders: they nest. The
// senders preempt one another.
const interleaveTraffic = `
on h sh -c 'for q in /sys/class/net/*/queues/rx-0/rps_cpus; do echo 1 > $q; done'
pids=
if [ ECHO -gt 0 ]; then
	mkfifo $TMP/ready
	on h taskset 1 chrt -f 10 traffic udp-echo -n ECHO -timeout 60s -ready $TMP/ready :ECHOPORT &
	echo=$!
	read line < $TMP/ready
	on c2 traffic udp-send -n ECHO 172.17.0.1:ECHOPORT &
	pids=$!
fi
n=0
for cpu in 1 1 ALL ALL; do
	on h taskset $cpu traffic flood -n LOCAL 10.211.55.1:$((20001 + 99 * n)) &
	pids="$pids $!"
	n=$((n + 1))
done
on c2 traffic flood -n FORWARD 10.211.55.1:20001 &
pids="$pids $!"
for pid in $pids; do wait $pid; done
if [ ECHO -gt 0 ]; then
	kill $echo 2> /dev/null || :
	wait $echo || :
fi
`

// TestInterleaved holds the rules that nftrace names against those that each packet
// must have matched, where calls of ipt_do_table overlap. Boot with preempt=full, or 7.x
// (make test-interleave): without it, tasks do not preempt one another in the kernel.
func TestInterleaved(t *testing.T) {
	needVM(t)
	if os.Getenv("NFTRACE_INTERLEAVE") == "" {
		t.Skip("needs preemption: make test-interleave")
	}
	up(t, "bare")
	if err := topo.Load(t.Context(), "h", "iptables-legacy", interleaveRuleset()); err != nil {
		t.Fatal(err)
	}
	const limit = 1 // per cent; a wrong rule fails the test always
	t.Run("senders", func(t *testing.T) {
		if n, all := runInterleaved(t, 500, 1000, 0); n*100 > limit*all {
			t.Errorf("%d of %d steps unresolved or lost, want %d %% at the most", n, all, limit)
		}
	})
	// An echo server of real-time priority: a packet for it, handled at the end of a
	// sender's call, lets it preempt the sender there and then, within our probes, too;
	// the kernel skips these for others then. What is told must still be right.
	t.Run("real-time", func(t *testing.T) { runInterleaved(t, 300, 500, 300) })
}

// runInterleaved sends, traces and checks. It returns the numbers of steps that could
// not be told and of all.
func runInterleaved(t *testing.T, local, forward, echo int) (bad, all int) {
	cpus := "1"
	if data, _ := os.ReadFile("/sys/devices/system/cpu/online"); strings.TrimSpace(string(data)) != "0" {
		cpus = "3"
	}
	tmp := t.TempDir()
	out, script := filepath.Join(tmp, "out"), filepath.Join(tmp, "run.sh")
	lines := strings.NewReplacer("LOCAL", strconv.Itoa(local), "FORWARD", strconv.Itoa(forward), "ECHOPORT", strconv.Itoa(echoPort),
		"ECHO", strconv.Itoa(echo), "ALL", cpus).Replace(interleaveTraffic)
	if err := os.WriteFile(script, []byte("set -e\n"+prelude+lines), 0o644); err != nil {
		t.Fatal(err)
	}
	before := evaluations(t)
	start := time.Now()
	// nftrace must get to read, whoever else runs.
	cmd := exec.CommandContext(t.Context(), "chrt", "-R", "-f", "20", "nftrace", "-v", "-o", out, "--format", "trace", "--netns", "h", "--", "sh", script)
	cmd.Env = append(os.Environ(), "TMP="+tmp)
	stderr, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(stderr), "the command ended: ") {
		t.Fatalf("nftrace: %v\n%s", err, stderr)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseSummary(string(stderr))
	if err != nil {
		t.Fatal(err)
	}
	r, err := checkInterleaved(strings.Split(strings.TrimSpace(string(data)), "\n"))
	if err != nil {
		t.Fatal(err)
	}
	all = r.resolved + r.unresolved
	t.Logf("in %v; stderr:\n%s", time.Since(start).Round(time.Second), stderr)
	t.Logf("%d packets, %d table steps, %d resolved, %d unresolved (%.2f %%), %d wrong, %d lost", s.packets, all, r.resolved,
		r.unresolved, 100*float64(r.unresolved)/float64(max(all, 1)), len(r.wrong), s.lost)
	for _, c := range slices.Sorted(maps.Keys(r.causes)) {
		t.Logf("%5d× %s", r.causes[c], c)
	}
	if len(r.wrong) > 0 {
		t.Errorf("%d wrong steps, such as\n%s", len(r.wrong), strings.Join(r.wrong[:min(len(r.wrong), 20)], "\n"))
	}
	if want := (4*local + forward) / 2; all < want {
		t.Errorf("%d table steps, want %d or more", all, want)
	}
	// The kernel's own counters: what nftrace did not see at all is missing, too.
	missing := evaluations(t) - before - all
	t.Logf("%d runs of the table were not seen (%.2f %%)", missing, 100*float64(missing)/float64(max(all, 1)))
	if missing < 0 {
		t.Errorf("%d table steps more than the kernel counted", -missing)
	}
	return r.unresolved + int(s.lost) + max(missing, 0), all
}

// interleavedNATTraffic are senders that preempt one another within NAT's probe, which the kernel
// skips for the others then.
const interleavedNATTraffic = `
pids=
for n in 1 2 3 4; do
	on h taskset 1 traffic raw -n EACH -sport $((10000 * n)) -proto udp 10.211.55.1:53 &
	pids="$pids $!"
done
for pid in $pids; do wait $pid; done
`

// TestInterleavedNAT: behind NAT the tables meet another packet than before, whether nftrace saw NAT
// or not.
func TestInterleavedNAT(t *testing.T) {
	needVM(t)
	if os.Getenv("NFTRACE_INTERLEAVE") == "" {
		t.Skip("needs preemption: make test-interleave")
	}
	up(t, "bare")
	const rules = `*nat
-A OUTPUT -p udp --dport 53 -j DNAT --to-destination 172.17.0.2:10
COMMIT
*filter
-A OUTPUT -p udp --dport 10 -j DROP
COMMIT
`
	if err := topo.Load(t.Context(), "h", "iptables-legacy", rules); err != nil {
		t.Fatal(err)
	}
	const each = 499
	tmp := t.TempDir()
	out := filepath.Join(tmp, "out")
	shell(t.Context(), t, tmp, "senders", []string{"chrt", "-R", "-f", "20", "nftrace", "-o", out, "--format", "trace", "--netns", "h", "--"},
		strings.ReplaceAll(interleavedNATTraffic, "EACH", strconv.Itoa(each)))
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	n, wrong := checkInterleavedNAT(string(data))
	t.Logf("%d runs of nat, %d of filter, %d of them of a packet that is not known, %d unresolved", n.nat, n.filter, n.unknown, n.unresolved)
	if len(wrong) > 0 {
		t.Errorf("%d wrong lines, such as\n%s", len(wrong), strings.Join(wrong[:min(len(wrong), 20)], ""))
	}
	if known := n.filter - n.unknown; n.nat < 2*each || n.nat > 4*each || n.filter > 4*each || known < each {
		t.Errorf("of %d packets %d runs of nat, %d of filter, %d of them of a known packet, want no more, half at least, and a quarter", 4*each, n.nat, n.filter, known)
	}
}

type interleavedNAT struct{ nat, filter, unknown, unresolved int }

var dstField = regexp.MustCompile(` DST=(\S+) .* DPT=(\d+) `)

// checkInterleavedNAT holds each line against the only one that there can be of its table.
func checkInterleavedNAT(out string) (n interleavedNAT, wrong []string) {
	for line := range strings.Lines(out) {
		dst := dstField.FindStringSubmatch(line)
		switch {
		case strings.HasPrefix(line, "#"):
		case unresolvedLine.MatchString(line):
			n.unresolved++
		case strings.Contains(line, "TRACE: nat:OUTPUT:rule:1 ") && dst != nil && dst[1] == "10.211.55.1" && dst[2] == "53":
			n.nat++
		case strings.Contains(line, "TRACE: filter:OUTPUT:rule:1 ") && strings.Contains(line, " [packet unresolved: "):
			n.filter++
			n.unknown++
		case strings.Contains(line, "TRACE: filter:OUTPUT:rule:1 ") && dst != nil && dst[1] == "172.17.0.2" && dst[2] == "10":
			n.filter++
		default:
			wrong = append(wrong, line)
		}
	}
	return n, wrong
}

func TestCheckInterleavedNATFindsPlantedErrors(t *testing.T) {
	const packet = "IN= OUT=eth0 SRC=10.211.55.8 DST=172.17.0.2 LEN=92 PROTO=UDP SPT=10001 DPT=10 LEN=72 \n"
	before := strings.NewReplacer("172.17.0.2", "10.211.55.1", "DPT=10", "DPT=53").Replace(packet)
	good := "TRACE: nat:OUTPUT:rule:1 " + before + "TRACE: filter:OUTPUT:rule:1 " + packet + "TRACE: filter:OUTPUT:rule:1 IN= OUT=eth0 [packet unresolved: the kernel skipped the probe of NAT]\n"
	if n, wrong := checkInterleavedNAT(good); len(wrong) > 0 || n != (interleavedNAT{nat: 1, filter: 2, unknown: 1}) {
		t.Errorf("%+v, %q", n, wrong)
	}
	for _, line := range []string{
		"TRACE: filter:OUTPUT:rule:1 " + before,
		"TRACE: nat:OUTPUT:rule:1 " + packet,
		"TRACE: filter:OUTPUT:policy:2 " + packet,
		"TRACE: filter:OUTPUT:rule:1 IN= OUT=eth0 \n",
	} {
		if _, wrong := checkInterleavedNAT(good + line); len(wrong) != 1 {
			t.Errorf("%s: %q", line, wrong)
		}
	}
}

// evaluations is how often table filter was run through in h: each run ends at a policy,
// which counts it.
func evaluations(t *testing.T) int {
	out, err := exec.CommandContext(t.Context(), "ip", "netns", "exec", "h", "iptables-legacy-save", "-c", "-t", "filter").Output()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for line := range strings.Lines(string(out)) {
		var chain, policy string
		var packets, bytes int
		if n, _ := fmt.Sscanf(line, ":%s %s [%d:%d]", &chain, &policy, &packets, &bytes); n == 4 {
			sum += packets
		}
	}
	return sum
}

type interleaved struct {
	resolved, unresolved int
	wrong                []string
	causes               map[string]int
}

var portField = regexp.MustCompile(`(?:^|\] )?.* SPT=(\d+) DPT=(\d+) `)

// checkInterleaved holds each run of table filter against what its ports say.
func checkInterleaved(lines []string) (interleaved, error) {
	r := interleaved{causes: map[string]int{}}
	// Lines of a run are together: rules, then the policy.
	var before []oracle.Line
	for _, text := range lines {
		if strings.HasPrefix(text, "#") {
			r.causes[strings.TrimPrefix(text, "# ")]++
			continue
		}
		if m := unresolvedLine.FindStringSubmatch(text); m != nil {
			r.unresolved++
			r.causes[m[1]]++
			before = nil
			continue
		}
		l, err := oracle.ParseLine(text)
		if err != nil {
			return r, err
		}
		if !strings.HasPrefix(l.Rule, "filter:") {
			return r, fmt.Errorf("only table filter was loaded: %s", text)
		}
		before = append(before, l)
		if !strings.Contains(l.Rule, ":policy:") {
			continue
		}
		r.resolved++
		if got, want := ruleNames(before), wantInterleaved(l); got != want {
			r.wrong = append(r.wrong, fmt.Sprintf("want %s, got %s: %s", want, got, text))
		}
		before = nil
	}
	if before != nil {
		return r, fmt.Errorf("a run without its policy: %s", before[0].Text)
	}
	return r, nil
}

func ruleNames(lines []oracle.Line) string {
	var s []string
	for _, l := range lines {
		s = append(s, l.Rule)
		if l.Flow != lines[0].Flow {
			s = append(s, "(of another packet)")
		}
	}
	return strings.Join(s, " ")
}

// wantInterleaved is the path of a packet through interleaveRuleset.
func wantInterleaved(l oracle.Line) string {
	hook := strings.Split(l.Rule, ":")[1]
	m := portField.FindStringSubmatch(l.Text)
	rules := map[string]int{"OUTPUT": interleaveRules, "FORWARD": 100}[hook]
	policy := fmt.Sprintf("filter:%s:policy:%d", hook, rules+1)
	if m == nil || rules == 0 || strings.Contains(l.Text, "PROTO=ICMP") {
		return policy
	}
	sport, _ := strconv.Atoi(m[1])
	dport, _ := strconv.Atoi(m[2])
	n := dport - interleavePort
	if hook == "OUTPUT" && sport == echoPort {
		n = interleaveRules
	}
	if n < 1 || n > rules {
		return policy
	}
	return fmt.Sprintf("filter:%s:rule:%d %s", hook, n, policy)
}

// The check must find a rule of another flow.
func TestCheckInterleavedFindsPlantedErrors(t *testing.T) {
	line := func(rule string) string {
		return "TRACE: filter:OUTPUT:" + rule + " IN= OUT=eth0 SRC=10.211.55.8 DST=10.211.55.1 LEN=92 ID=1 DF PROTO=UDP SPT=5555 DPT=20007 LEN=72 UID=0 GID=0 "
	}
	for _, tt := range []struct {
		lines string
		wrong int
	}{
		{line("rule:7") + "\n" + line("policy:401"), 0},
		{line("rule:8") + "\n" + line("policy:401"), 1},
		{line("policy:401"), 1},
		{line("rule:7") + "\n" + line("rule:8") + "\n" + line("policy:401"), 1},
		{line("rule:7") + "\n" + line("policy:400"), 1},
		{line("rule:7") + "\n" + strings.Replace(line("policy:401"), "20007", "20008", 1), 1},
	} {
		r, err := checkInterleaved(strings.Split(tt.lines, "\n"))
		if err != nil {
			t.Fatal(err)
		}
		if len(r.wrong) != tt.wrong || r.resolved != 1 {
			t.Errorf("%s: %+v, want %d wrong", tt.lines, r, tt.wrong)
		}
	}
}
