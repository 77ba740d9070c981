package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"
)

// An arpCase is a ruleset of arptables. ARP has no TRACE: how often nftrace names each rule must
// be how often the rule counted.
type arpCase struct {
	name    string
	rules   string // arguments of arptables, a command a line
	traffic string // behind arpTraffic
	hits    string // CHAIN NUMBER… or CHAIN policy: what must be met, so that a dead ruleset shows
	legacy  bool   // arptables-nft does not know all of it
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
		default:
			return nil, fmt.Errorf("no such section: %q", f.Name)
		}
	}
	if c.rules == "" || c.hits == "" {
		return nil, errors.New("no rules, or no hits")
	}
	return c, nil
}

// randomARP makes rules of a seed: chains that jump to later ones only.
func randomARP(seed int64) *arpCase {
	r := rand.New(rand.NewSource(seed))
	conditions := []string{"", "-s 172.17.0.0/16", "! -s 172.17.0.3", "-d 172.17.0.1", "--opcode 1", "! --opcode 1", "-i docker0", "-o eth0",
		"--source-mac 02:00:ac:11:00:03", "! --source-mac 02:00:00:00:00:00/ff:ff:ff:00:00:00", "--h-type 1", "--proto-type 0x800"}
	users := []string{"a", "b", "c", "d"}
	var b strings.Builder
	for _, u := range users {
		fmt.Fprintf(&b, "-N %s\n", u)
	}
	chain := func(name string, later []string) {
		for range 1 + r.Intn(5) {
			c := conditions[r.Intn(len(conditions))]
			if name == "INPUT" && strings.HasPrefix(c, "-o") || name == "OUTPUT" && strings.HasPrefix(c, "-i") {
				continue
			}
			target := []string{"", "-j RETURN", "-j ACCEPT", "-j DROP", "-j MARK --set-mark 3"}[r.Intn(5)]
			if len(later) > 0 && r.Intn(3) > 0 {
				target = "-j " + later[r.Intn(len(later))]
			}
			fmt.Fprintf(&b, "-A %s %s %s\n", name, c, target)
		}
	}
	for i, u := range users {
		chain(u, users[i+1:])
	}
	for _, base := range []string{"INPUT", "OUTPUT", "FORWARD"} {
		chain(base, users)
	}
	fmt.Fprintf(&b, "-P FORWARD %s\n", []string{"ACCEPT", "DROP"}[r.Intn(2)])
	return &arpCase{name: fmt.Sprintf("seed-%d", seed), rules: b.String(), legacy: true}
}

// TestTruthARP holds the rules that nftrace names against the rules' own counters, of
// arptables-legacy and of arptables-nft. NFTRACE_TRUTH is as in TestTruth.
func TestTruthARP(t *testing.T) {
	cases := rulesets(t, "arp", 15, parseARP)
	from, to := seeds(t)
	for seed := from; seed <= to; seed++ {
		cases = append(cases, randomARP(int64(seed)))
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
			for _, c := range cases {
				// nf_tables has no hook at which bridged ARP passes.
				if program == "arptables-nft" && (c.legacy || strings.Contains(c.rules, "FORWARD")) {
					continue
				}
				t.Run(c.name, func(t *testing.T) { runARP(t, program, c) })
			}
		})
	}
}

func runARP(t *testing.T, program string, c *arpCase) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var b strings.Builder
	fmt.Fprintf(&b, "set -e\n%s -F\n%[1]s -X\n", program)
	for _, chain := range []string{"INPUT", "OUTPUT"} {
		fmt.Fprintf(&b, "%s -P %s ACCEPT\n", program, chain)
	}
	if program == "arptables-legacy" {
		fmt.Fprintf(&b, "%s -P FORWARD ACCEPT\n%[1]s -Z\n", program)
	}
	for line := range strings.Lines(c.rules) {
		if line = strings.TrimSpace(line); line != "" {
			fmt.Fprintf(&b, "%s %s\n", program, line)
		}
	}
	load := exec.CommandContext(ctx, "ip", "netns", "exec", "h", "sh")
	load.Stdin = strings.NewReader(b.String())
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s\n%s", err, out, b.String())
	}
	before := arpCounters(ctx, t, program)
	out, stderr := traffic(ctx, t, &truth{traffic: arpTraffic + c.traffic, alone: true}, "nftrace", "--format", "trace", "arp")
	after := arpCounters(ctx, t, program)

	s, err := parseSummary(stderr)
	if err != nil {
		t.Fatal(err)
	}
	if s.lost != 0 || s.unresolved != 0 {
		t.Errorf("%s", s.line)
	}
	said, lines := map[arpRule]int{}, 0
	for line := range strings.Lines(string(out)) {
		m := arpLine.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("not a line of a rule: %s", line)
			continue
		}
		n, _ := strconv.Atoi(m[2])
		said[arpRule{m[1], n}]++
		lines++
	}
	for rule, n := range after.packets {
		if want := n - before.packets[rule]; said[rule] != want {
			t.Errorf("%s:%d: nftrace named it %d times, it counted %d", rule.chain, rule.num, said[rule], want)
		}
		delete(said, rule)
	}
	// The ends of chains, which the programs do not list.
	for rule := range said {
		if n, ok := after.rules[rule.chain]; !ok || rule.num != n+1 {
			t.Errorf("%s:%d is no rule", rule.chain, rule.num)
		}
	}
	for line := range strings.Lines(c.hits) {
		words := strings.Fields(line)
		for _, w := range words[1:] {
			rule := arpRule{chain: words[0]}
			if rule.num, err = strconv.Atoi(w); err != nil {
				if program == "arptables-nft" {
					continue // which does not count policies
				}
				rule.num = after.rules[rule.chain] + 1
			}
			if after.packets[rule] == before.packets[rule] {
				t.Errorf("%s %s was not met", words[0], w)
			}
		}
	}
	if t.Failed() {
		t.Logf("%s%s\n%s", after.text, stderr, out)
	}
	t.Logf("%d packets, %d lines, %d rules", s.packets, lines, len(after.packets))
}

type arpRule struct {
	chain string
	num   int // from 1; the policy is behind the last rule
}

type arpCount struct {
	packets map[arpRule]int
	rules   map[string]int // in a chain
	text    string
}

var (
	arpLine   = regexp.MustCompile(`^TRACE: arp:filter:(\w+):(?:rule|return|policy):(\d+) IN=`)
	arpChain  = regexp.MustCompile(`^Chain (\w+) \((?:policy \w+ (\d+) packets, \d+ bytes|\d+ references)\)$`)
	arpPacket = regexp.MustCompile(`, pcnt=(\d+) -- bcnt=(\d+) *$`)
)

// arpCounters reads the counters of all rules, and of policies where they are counted.
func arpCounters(ctx context.Context, t *testing.T, program string) arpCount {
	t.Helper()
	out, err := exec.CommandContext(ctx, "ip", "netns", "exec", "h", program, "-L", "-n", "-v", "-x").Output()
	if err != nil {
		t.Fatal(err)
	}
	c := arpCount{map[arpRule]int{}, map[string]int{}, string(out)}
	chain, policy := "", ""
	end := func() {
		if n, err := strconv.Atoi(policy); err == nil && program == "arptables-legacy" {
			c.packets[arpRule{chain, c.rules[chain] + 1}] = n
		}
	}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if m := arpChain.FindStringSubmatch(line); m != nil {
			end()
			chain, policy = m[1], m[2]
			c.rules[chain] = 0
		} else if m := arpPacket.FindStringSubmatch(line); m != nil {
			c.rules[chain]++
			c.packets[arpRule{chain, c.rules[chain]}], _ = strconv.Atoi(m[1])
		} else if line != "" && !strings.HasPrefix(line, "#") {
			t.Fatalf("%s lists %q", program, line)
		}
	}
	end()
	if len(c.rules) < 2 {
		t.Fatalf("%s lists no chains:\n%s", program, out)
	}
	return c
}
