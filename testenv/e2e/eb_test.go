package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/topo"
)

// ebTruth is a ruleset of ebtables-legacy with its traffic.
type ebTruth struct {
	name    string
	rules   string // input of ebtables-legacy-restore, with "@300 TEXT" as in testdata/truth
	next    string // the same, what replaces it, for $NEXT in traffic; $RULES is the first
	traffic string // a script of testenv/cmd/traffic, behind ebTraffic
	hits    string // rules that packets must match, as "table:CHAIN:rule:N"
	// unresolved is for what cause runs may be unresolved.
	unresolved string
}

// ebTraffic is through the bridge, up and down it, of IPv4, IPv6, UDP, TCP and ICMP.
const ebTraffic = `
serve c1 tcp-serve :80
serve c1 udp-echo :7
serve h udp-echo :7
serve ext udp-echo :7
- c2 raw -proto icmp -n 3 -sport 301 -id 101 172.17.0.2
- c2 raw -proto icmp -n 2 -sport 303 fd00:17::2
- h raw -proto icmp -n 2 -sport 305 -id 121 172.17.0.2
- c2 tcp-get -size 3000 -timeout 300ms 172.17.0.2:80
- c2 udp-send -n 3 -reply -timeout 100ms 172.17.0.2:7
- c2 udp-send -n 2 -reply -timeout 100ms 10.211.55.1:7
- c2 udp-send -n 2 -reply -timeout 100ms 172.17.0.1:7
- h udp-send -n 2 -reply -timeout 100ms 172.17.0.2:7
- c2 udp-send -n 2 -reply -timeout 100ms [fd00:17::2]:7
- c2 udp-send -n 3 172.17.0.2:12345
- ext udp-send -n 2 172.17.0.2:9
`

var ebTruths = []ebTruth{
	{name: "empty", rules: "*broute\n*nat\n*filter\n"},
	{name: "policies", rules: `*nat
:PREROUTING ACCEPT
-A PREROUTING -p IPv4 --ip-proto udp --ip-dport 12345 -j CONTINUE
*filter
:FORWARD DROP
:INPUT DROP
:OUTPUT ACCEPT
-A FORWARD -p IPv4 --ip-proto icmp -j ACCEPT
-A FORWARD -p IPv4 --ip-proto udp --ip-dport 7 -j ACCEPT
-A INPUT -p IPv4 --ip-proto udp -j ACCEPT
`, hits: "nat:PREROUTING:rule:1 filter:FORWARD:rule:1 filter:FORWARD:rule:2 filter:INPUT:rule:1"},
	{name: "chains", rules: `*filter
:FORWARD ACCEPT
:ACC ACCEPT
:DRP DROP
:RET RETURN
:DEEP RETURN
:DEEPER RETURN
-A FORWARD -j RET
-A FORWARD -p IPv4 --ip-proto udp --ip-dport 12345 -j DRP
-A FORWARD -p IPv4 --ip-proto icmp -j ACC
-A FORWARD -j DEEP
-A FORWARD -j RET
-A FORWARD -p IPv6 -j CONTINUE
-A FORWARD -p IPv4 -j RET
-A DRP -p IPv4 --ip-src 172.17.0.2 -j RETURN
-A DRP -p IPv4 -j CONTINUE
-A ACC -p IPv4 --ip-dst 172.17.0.2 -j RETURN
-A ACC -p IPv4 -j CONTINUE
-A RET -p IPv4 --ip-proto tcp -j RETURN
-A RET -p IPv4 -j CONTINUE
-A RET -p IPv6 -j RETURN
-A RET -j CONTINUE
-A DEEP -p IPv4 -j DEEPER
-A DEEP -j RETURN
-A DEEP -j DROP
-A DEEPER -p IPv4 --ip-proto tcp -j ACCEPT
-A DEEPER -j RETURN
`, hits: "filter:RET:rule:1 filter:RET:rule:2 filter:RET:rule:3 filter:DRP:rule:2 filter:ACC:rule:1 filter:ACC:rule:2 filter:DEEP:rule:1 filter:DEEP:rule:2 filter:DEEPER:rule:1 filter:DEEPER:rule:2 filter:FORWARD:rule:7"},
	{name: "targets", rules: `*nat
:PREROUTING ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:U RETURN
-A PREROUTING -p IPv4 --ip-proto udp --ip-dport 12345 -j mark --mark-set 0x11 --mark-target CONTINUE
-A PREROUTING --mark 0x11 -j mark --mark-or 0x20 --mark-target CONTINUE
-A PREROUTING -p IPv4 --ip-proto icmp -j U
-A PREROUTING -p IPv4 --ip-proto tcp -j dnat --to-dst 02:00:ac:11:00:02 --dnat-target ACCEPT
-A PREROUTING -p IPv4 --ip-dst 172.17.0.1 -j redirect --redirect-target CONTINUE
-A PREROUTING -p IPv4 -j CONTINUE
-A U -i vethc2 -j dnat --to-dst 02:00:ac:11:00:02 --dnat-target RETURN
-A U -j mark --mark-set 0x7 --mark-target RETURN
-A OUTPUT -p IPv4 --ip-proto icmp -j mark --mark-set 0x5 --mark-target ACCEPT
-A POSTROUTING --mark 0x31 -j snat --to-src 02:00:ac:11:00:03 --snat-target CONTINUE
-A POSTROUTING -p IPv6 -j snat --to-src 02:00:ac:11:00:03
-A POSTROUTING --mark 0x31 -j CONTINUE
`, hits: "nat:PREROUTING:rule:1 nat:PREROUTING:rule:2 nat:PREROUTING:rule:3 nat:PREROUTING:rule:4 nat:PREROUTING:rule:5 nat:PREROUTING:rule:6 nat:U:rule:1 nat:U:rule:2 nat:OUTPUT:rule:1 nat:POSTROUTING:rule:1 nat:POSTROUTING:rule:2 nat:POSTROUTING:rule:3"},
	{name: "broute", rules: `*broute
:BROUTING ACCEPT
:B DROP
-A BROUTING -p IPv4 --ip-proto udp --ip-dport 12345 -j DROP
-A BROUTING -p IPv4 --ip-proto tcp -j redirect --redirect-target DROP
-A BROUTING -p IPv6 --ip6-proto udp -j B
-A BROUTING -p IPv4 -j CONTINUE
-A B -j CONTINUE
*nat
:PREROUTING ACCEPT
-A PREROUTING -j CONTINUE
`, hits: "broute:BROUTING:rule:1 broute:BROUTING:rule:2 broute:BROUTING:rule:3 broute:BROUTING:rule:4 broute:B:rule:1 nat:PREROUTING:rule:1"},
	{name: "matches", rules: `*filter
:FORWARD ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
-A FORWARD -p IPv4 --ip-src 172.17.0.3 --ip-tos 0x00 -j CONTINUE
-A FORWARD -p IPv4 --ip-src ! 172.17.0.0/255.255.255.254 -j CONTINUE
-A FORWARD -p IPv6 --ip6-dst fd00:17::2 -j CONTINUE
-A FORWARD -p ! IPv4 -j CONTINUE
-A FORWARD -i vethc2 -o vethc1 -j CONTINUE
-A FORWARD --logical-in docker0 -j CONTINUE
-A FORWARD -s 02:00:ac:11:00:03 -j CONTINUE
-A FORWARD -d ! 02:00:ac:11:00:03 -j CONTINUE
-A FORWARD --among-src 02:00:ac:11:00:03=172.17.0.3, -j CONTINUE
-A FORWARD --limit 3/hour --limit-burst 2 -j CONTINUE
-A FORWARD -p IPv4 --ip-proto udp --ip-dport 7:9 -j CONTINUE
-A FORWARD --pkttype-type otherhost -j CONTINUE
-A FORWARD -p 802_1Q --vlan-id 5 -j CONTINUE
-A FORWARD -p ARP --arp-opcode Request -j CONTINUE
-A INPUT -i vethc+ --logical-in docker+ -j CONTINUE
-A OUTPUT -o vethc1 --logical-out docker0 -j CONTINUE
`, traffic: "- c2 udp-send -n 7 172.17.0.2:8\nsh ip netns exec c2 arping -c 3 -w 1 -I eth0 172.17.0.2 || true\n",
		hits: "filter:FORWARD:rule:1 filter:FORWARD:rule:3 filter:FORWARD:rule:4 filter:FORWARD:rule:5 filter:FORWARD:rule:6 filter:FORWARD:rule:7 filter:FORWARD:rule:8 filter:FORWARD:rule:9 filter:FORWARD:rule:10 filter:FORWARD:rule:11 filter:FORWARD:rule:14 filter:INPUT:rule:1 filter:OUTPUT:rule:1"},
	{name: "arpreply", rules: `*nat
:PREROUTING ACCEPT
-A PREROUTING -p ARP --arp-opcode Request --arp-ip-dst 172.17.0.99 -j arpreply --arpreply-mac 02:00:00:00:00:99 --arpreply-target DROP
-A PREROUTING -p ARP -j CONTINUE
`, traffic: "sh ip netns exec c2 arping -c 3 -w 1 -I eth0 172.17.0.99 || true\nsh ip netns exec c2 arping -c 2 -w 1 -I eth0 172.17.0.2 || true\n",
		hits: "nat:PREROUTING:rule:1 nat:PREROUTING:rule:2"},
	{name: "many", rules: `*filter
:FORWARD ACCEPT
:FAR RETURN
@300 -A FORWARD -p IPv4 --ip-proto udp --ip-dport 12%d -j DROP
-A FORWARD -j FAR
@257 -A FAR -p IPv4 --ip-proto udp --ip-dport 13%d -j CONTINUE
-A FAR -p IPv4 --ip-proto udp -j CONTINUE
-A FAR -j RETURN
`, traffic: "- c2 udp-send -n 3 172.17.0.2:12255\n- c2 udp-send -n 2 172.17.0.2:12256\n- c2 udp-send -n 2 172.17.0.2:12257\n", hits: "filter:FORWARD:rule:255 filter:FORWARD:rule:256 filter:FORWARD:rule:257 filter:FORWARD:rule:301 filter:FAR:rule:258 filter:FAR:rule:259"},
	{name: "twice", rules: `*filter
:FORWARD ACCEPT
:U RETURN
:V RETURN
-A FORWARD -j U
-A FORWARD -p IPv4 -j V
-A FORWARD -j U
-A FORWARD -j V
-A U --mark 0x7/0xf -j RETURN
-A U -p IPv4 --ip-proto udp -j mark --mark-or 0x7 --mark-target RETURN
-A U --mark ! 0x7 -j mark --mark-set 0x8 --mark-target CONTINUE
-A U -p IPv4 --ip-proto icmp -j mark --mark-xor 0x3 --mark-target CONTINUE
-A V --mark 0x8 -j CONTINUE
-A V --mark ! 0x7 -j mark --mark-and 0xb --mark-target CONTINUE
`, traffic: "- c2 udp-send -n 7 172.17.0.2:8\n",
		hits: "filter:U:rule:1 filter:U:rule:2 filter:U:rule:3 filter:U:rule:4 filter:V:rule:1 filter:V:rule:2"},
	// The same rules, as often, in another order.
	{name: "marks", rules: `*nat
:PREROUTING ACCEPT
-A PREROUTING -p IPv4 --ip-proto icmp -j mark --mark-set 0x1 --mark-target ACCEPT
*filter
:FORWARD ACCEPT
:U RETURN
-A FORWARD -p IPv4 -j U
-A FORWARD -p IPv4 -j U
-A U --mark 0x1 -j mark --mark-xor 0x1 --mark-target RETURN
-A U -j mark --mark-xor 0x1 --mark-target RETURN
`, hits: "nat:PREROUTING:rule:1 filter:FORWARD:rule:1 filter:FORWARD:rule:2 filter:U:rule:1 filter:U:rule:2"},
	{name: "limit-twice", rules: `*filter
:FORWARD ACCEPT
:U RETURN
-A FORWARD -j U
-A FORWARD -j U
-A U --limit 1/hour --limit-burst 3 -j CONTINUE
`, traffic: "- c2 udp-send -n 7 172.17.0.2:8\n",
		hits: "filter:FORWARD:rule:1 filter:FORWARD:rule:2 filter:U:rule:1", unresolved: "more than one path"},
	{name: "replaced", rules: `*filter
:FORWARD ACCEPT
-A FORWARD -p ARP -j CONTINUE
-A FORWARD -p IPv4 -j CONTINUE
-A FORWARD -p IPv4 --ip-proto udp -j ACCEPT
`, next: `*filter
:FORWARD ACCEPT
:N RETURN
-A FORWARD -j N
-A FORWARD -p IPv6 -j CONTINUE
-A FORWARD -p IPv4 -j ACCEPT
-A N -p IPv4 -j CONTINUE
`, traffic: `& c2 flood -n 397 -ports 397 172.17.0.2:20000
sh ip netns exec h ebtables-legacy-restore < $NEXT
- c2 flood -n 31 -ports 31 172.17.0.2:21000
sh ip netns exec h ebtables-legacy-restore < $RULES
sh ip netns exec h ebtables-legacy -t filter -Z
- c2 flood -n 31 -ports 31 172.17.0.2:22000
sh ip netns exec h ebtables-legacy-restore < $NEXT
sh ip netns exec h ebtables-legacy-restore < $RULES
- c2 flood -n 31 -ports 31 172.17.0.2:23000
sh ip netns exec h ebtables-legacy-restore < $NEXT
- c2 flood -n 31 -ports 31 172.17.0.2:24000
wait
`, hits: "filter:FORWARD:rule:2 filter:FORWARD:rule:3 filter:N:rule:1", unresolved: "replaced|at once|counters were being"},
}

// randomEB makes a ruleset of a seed: jumps lead to chains further down only. A limit, which may be
// met once and not the other time, is in no chain that a packet can enter twice: see limit-twice.
func randomEB(seed uint64) *ebTruth {
	r := rand.New(rand.NewPCG(seed, 7))
	pick := func(s ...string) string { return s[r.IntN(len(s))] }
	var b strings.Builder
	for _, t := range []struct{ name, chains string }{{"broute", "BROUTING"}, {"nat", "PREROUTING OUTPUT POSTROUTING"}, {"filter", "INPUT FORWARD OUTPUT"}} {
		fmt.Fprintf(&b, "*%s\n", t.name)
		chains := strings.Fields(t.chains)
		base := len(chains)
		for range 4 {
			chains = append(chains, fmt.Sprintf("U%d", len(chains)-base))
		}
		entered := make([][]int, len(chains)) // how often each can be, from each built-in chain
		for i := range entered {
			entered[i] = make([]int, base)
			if i < base {
				entered[i][i] = 1
			}
		}
		for i, c := range chains {
			policy := "ACCEPT"
			if i >= base {
				policy = pick("RETURN", "RETURN", "RETURN", "ACCEPT", "DROP")
			} else if t.name == "filter" && r.IntN(4) == 0 {
				policy = "DROP"
			}
			fmt.Fprintf(&b, ":%s %s\n", c, policy)
		}
		for i, c := range chains {
			for range 1 + r.IntN(7) {
				match := pick("", "-p IPv4", "-p IPv6", "-p IPv4 --ip-proto udp", "-p IPv4 --ip-proto icmp", "-p IPv4 --ip-proto tcp",
					"-p IPv4 --ip-proto udp --ip-dport 7", "-p IPv4 --ip-src 172.17.0.3", "-p IPv4 --ip-dst ! 172.17.0.2",
					"-s 02:00:ac:11:00:03", "-d ! 02:00:ac:11:00:02", "--mark 0x1", "--mark ! 0x1", "--limit 1/hour --limit-burst 3")
				if strings.Contains(match, "limit") && slices.Max(entered[i]) > 1 {
					match = ""
				}
				target := pick("CONTINUE", "CONTINUE", "CONTINUE", "ACCEPT", "jump", "jump", "jump", "mark --mark-set 0x1 --mark-target CONTINUE",
					"mark --mark-and 0x0 --mark-target CONTINUE", "mark --mark-set 0x1 --mark-target RETURN", "RETURN", "DROP")
				if target == "DROP" && r.IntN(3) > 0 {
					target = "CONTINUE"
				}
				switch to := max(base, i+1); {
				case target == "jump" && to < len(chains):
					to += r.IntN(len(chains) - to)
					for at, n := range entered[i] {
						entered[to][at] += n
					}
					target = chains[to]
				case target == "jump", i < base && strings.HasSuffix(target, "RETURN"):
					target = "CONTINUE"
				}
				fmt.Fprintf(&b, "-A %s %s -j %s\n", c, match, target)
			}
		}
	}
	return &ebTruth{name: fmt.Sprintf("seed-%d", seed), rules: b.String()}
}

// ebLogged gives each rule a watcher that logs where it is; what it logs begins as a line of
// TRACE does, so that the oracle takes it.
func ebLogged(rules string) (string, error) {
	rules, err := expand(rules)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	table, num := "", map[string]int{}
	for line := range strings.Lines(rules) {
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = strings.TrimSpace(line[1:])
			num = map[string]int{}
		case len(f) > 2 && f[0] == "-A":
			num[f[1]]++
			head, target, ok := strings.Cut(line, "-j ")
			if !ok {
				return "", fmt.Errorf("no target: %q", line)
			}
			line = fmt.Sprintf(`%s--log-ip --log-ip6 --log-prefix "TRACE: %s:%s:%d" -j %s`, head, table[:1], f[1], num[f[1]], target)
		}
		b.WriteString(line)
	}
	return b.String(), nil
}

var ebLogLine = regexp.MustCompile(`^TRACE: ([bnf]):([A-Z0-9]+):([0-9]+) +IN=\S* OUT=\S* .*proto = 0x([0-9a-f]{4})(.*)`)

// ebTables are the tables by the letters that are in the log.
var ebTables = map[string]string{"b": "broute", "n": "nat", "f": "filter"}

// ebKernel are the rules that the kernel logged, in its order, by packet: addresses, protocol
// and ports. Of what is not IP all packets are one.
func ebKernel(lines []string) (map[string][]string, error) {
	out := map[string][]string{}
	for _, l := range lines {
		m := ebLogLine.FindStringSubmatch(l)
		if m == nil {
			return nil, fmt.Errorf("not a line of a rule: %q", l)
		}
		key := m[4]
		if key == "0800" || key == "86dd" {
			get := func(re string) string {
				if v := regexp.MustCompile(re).FindStringSubmatch(m[5]); v != nil {
					return v[1]
				}
				return "-"
			}
			key = strings.Join([]string{addr(get(`SRC=([0-9a-f.:]+?),? `)), addr(get(`DST=([0-9a-f.:]+?),? `)), get(`(?:IP proto=|Next Header=|protocol=)([0-9]+)`), get(`SPT=([0-9]+)`), get(`DPT=([0-9]+)`)}, " ")
		}
		out[key] = append(out[key], ebTables[m[1]]+":"+m[2]+":rule:"+m[3])
	}
	return out, nil
}

// ebTool is the same of nftrace's JSON, but for each run of a table by itself, in the order in which
// they began; open are the packets of which a run is unresolved.
func ebTool(data []byte, cause *regexp.Regexp) (out map[string][][]string, open map[string]bool, packets int, err error) {
	type packet struct {
		Family       string
		EtherType    int
		Src, Dst     string
		Proto        *int
		Sport, Dport *int
	}
	type run struct {
		at    int64
		key   string
		rules []string
	}
	var runs []run
	open = map[string]bool{}
	for d := json.NewDecoder(bytes.NewReader(data)); ; {
		var o struct {
			Steps []struct {
				Kind      string
				NetnsName string `json:"netns_name"`
				TimeNS    int64  `json:"time_ns"`
				Family    string
				Table     *struct {
					Name, Engine, Unresolved string
					Before                   packet
					Rules                    []struct {
						Trace    string
						IsPolicy bool `json:"is_policy"`
						IsEnd    bool `json:"is_end"`
						Chain    string
						Number   int
					}
				}
			}
		}
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, nil, 0, err
		}
		packets++
		for _, s := range o.Steps {
			if s.Kind != "table" || s.Table.Engine != "xtables" || s.Family != "bridge" || s.NetnsName != "h" {
				continue
			}
			p := s.Table.Before
			key := fmt.Sprintf("%04x", p.EtherType)
			if p.Family != "" {
				or := func(n *int) string {
					if n == nil {
						return "-"
					}
					return fmt.Sprint(*n)
				}
				key = strings.Join([]string{addr(p.Src), addr(p.Dst), or(p.Proto), or(p.Sport), or(p.Dport)}, " ")
			}
			if why := s.Table.Unresolved; why != "" {
				if cause == nil || !cause.MatchString(why) {
					return nil, nil, 0, fmt.Errorf("%s: table %s is unresolved: %s", key, s.Table.Name, why)
				}
				open[key] = true
			}
			r := run{at: s.TimeNS, key: key}
			for _, rule := range s.Table.Rules {
				if !rule.IsPolicy && !rule.IsEnd {
					r.rules = append(r.rules, fmt.Sprintf("%s:%s:rule:%d", s.Table.Name, rule.Chain, rule.Number))
				}
			}
			runs = append(runs, r)
		}
	}
	slices.SortStableFunc(runs, func(a, b run) int { return int(a.at - b.at) })
	out = map[string][][]string{}
	for _, r := range runs {
		out[r.key] = append(out[r.key], r.rules)
	}
	return out, open, packets, nil
}

// compareEB holds both against each other. Packets of one flow may run through tables at once, one
// on each of some CPUs.
func compareEB(kernel map[string][]string, tool map[string][][]string, open map[string]bool, cpus int) error {
	var errs []error
	met := map[string][][]string{}
	for key, runs := range tool {
		for _, rules := range runs {
			if len(rules) > 0 {
				met[key] = append(met[key], rules)
			}
		}
	}
	for key, want := range kernel {
		if got := met[key]; !open[key] && !madeOf(want, nil, got, cpus) {
			errs = append(errs, fmt.Errorf("packets %s:\n  kernel  %s\n  nftrace %s", key, strings.Join(want, " "), strings.Join(slices.Concat(got...), " ")))
		}
	}
	for key, got := range met {
		if len(kernel[key]) == 0 && !open[key] {
			errs = append(errs, fmt.Errorf("packets %s: the kernel logged no rule, nftrace has %s", key, strings.Join(slices.Concat(got...), " ")))
		}
	}
	return errors.Join(errs...)
}

// madeOf tells whether the lines of a log are those of some runs, all of them and each in its order,
// where most of them at the most are under way at once. What is left of these is in open; of the
// rest, one of the next most begins next.
func madeOf(log []string, open, rest [][]string, most int) bool {
	if len(log) == 0 {
		return len(open) == 0 && len(rest) == 0
	}
	without := func(runs [][]string, i int) [][]string { return slices.Delete(slices.Clone(runs), i, i+1) }
	next := func(open [][]string, run []string, rest [][]string) bool {
		if run[0] != log[0] {
			return false
		}
		if len(run) > 1 {
			open = append(open, run[1:])
		}
		return madeOf(log[1:], open, rest, most)
	}
	for i, run := range open {
		if next(without(open, i), run, rest) {
			return true
		}
	}
	for i, run := range rest[:min(most, len(rest))] {
		if len(open) < most && next(slices.Clone(open), run, without(rest, i)) {
			return true
		}
	}
	return false
}

// TestTruthEB holds nftrace against what rules of ebtables log themselves: each rule that
// matched, of each packet, in its order. NFTRACE_EB=1/3 leaves some out, NFTRACE_SEEDS asks for
// more.
func TestTruthEB(t *testing.T) {
	var cases []*ebTruth
	for i := range ebTruths {
		cases = append(cases, &ebTruths[i])
	}
	from, to := seeds(t)
	for seed := from; seed <= to; seed++ {
		cases = append(cases, randomEB(seed))
	}
	cases = some(t, "NFTRACE_EB", cases)
	needVM(t)
	if !hasEbtables() {
		t.Skip("this kernel has no ebtables but by way of nf_tables")
	}
	up(t, "bare")
	shell(t.Context(), t, t.TempDir(), "setup", nil, truthSetup+"modprobe -a ebtable_broute ebtable_nat ebtable_filter ebt_log\n")
	o, err := oracle.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close(context.WithoutCancel(t.Context()))
	kernel := &kernelLines{o: o}
	var total tally
	open := 0
	run := func(c *ebTruth, w *watch) {
		if !t.Run(c.name, func(t *testing.T) {
			packets, lines, n := runEB(t, c, kernel, w)
			total.rulesets++
			total.packets += packets
			total.lines += lines
			open += n
		}) {
			total.failed++
		}
	}
	runTogether(t, cases, run, func(rest []byte) error { return (&ebTruth{}).check(kernel, rest, new(ebFound)) }, "--format", "json")
	t.Logf("compared: %d rulesets, %d packets, %d lines, %d kinds of packets unresolved; %d rulesets differ",
		total.rulesets, total.packets, total.lines, open, total.failed)
}

// needsOwn: see truth.needsOwn.
func (c *ebTruth) needsOwn() bool { return c.unresolved != "" }

// ebFound is what a comparison saw.
type ebFound struct {
	kernel  map[string][]string
	tool    map[string][][]string
	open    map[string]bool
	lines   []string
	packets int
}

// check holds nftrace's JSON against what the kernel has logged since the case before.
func (c *ebTruth) check(kernel *kernelLines, out []byte, f *ebFound) (err error) {
	if f.lines, err = kernel.more(); err != nil {
		return err
	}
	if f.kernel, err = ebKernel(f.lines); err != nil {
		return err
	}
	var cause *regexp.Regexp
	if c.unresolved != "" {
		cause = regexp.MustCompile(c.unresolved)
	}
	if f.tool, f.open, f.packets, err = ebTool(out, cause); err != nil {
		return err
	}
	return compareEB(f.kernel, f.tool, f.open, runtime.NumCPU())
}

// runEB runs one case, under the nftrace that is there or one of its own.
func runEB(t *testing.T, c *ebTruth, kernel *kernelLines, w *watch) (packets, lines, unresolved int) {
	tmp := t.TempDir()
	clear := "*broute\n:BROUTING ACCEPT\n*nat\n:PREROUTING ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n"
	script := "set -e\n"
	for name, rules := range map[string]string{"RULES": c.rules, "NEXT": c.next} {
		text, err := ebLogged(rules)
		if err != nil {
			t.Fatal(err)
		}
		script += fmt.Sprintf("cat > %s/%s <<'END'\n%sEND\n", tmp, name, text)
	}
	script += fmt.Sprintf("cat > %s/CLEAR <<'END'\n%sEND\n", tmp, clear)
	script += fmt.Sprintf("ebtables-legacy-restore < %s/CLEAR\nebtables-legacy-restore < %s/RULES\n", tmp, tmp)
	if err := topo.Shell(t.Context(), "h", script); err != nil {
		t.Fatalf("%v\n%s", err, c.rules)
	}
	sent := &truth{traffic: strings.NewReplacer("$RULES", tmp+"/RULES", "$NEXT", tmp+"/NEXT").Replace(ebTraffic + c.traffic), alone: true}
	var f ebFound
	check := func(out []byte) error { return c.check(kernel, out, &f) }
	var err error
	if w != nil {
		traffic(t.Context(), t, sent)
		err = w.take(check)
	} else {
		if err := kernel.skip(); err != nil {
			t.Fatal(err)
		}
		out, stderr := traffic(t.Context(), t, sent, "nftrace", "--format", "json")
		err = errors.Join(check(out), checkSummary(stderr, c.unresolved))
	}
	if err != nil {
		t.Errorf("%v\nrules:\n%s", err, c.rules)
	}
	kernel.next(f.lines)
	told := slices.Concat(slices.Collect(maps.Values(f.tool))...)
	for who, all := range map[string][]string{"the kernel": slices.Concat(slices.Collect(maps.Values(f.kernel))...), "nftrace": slices.Concat(told...)} {
		for _, h := range strings.Fields(c.hits) {
			// nftrace may have all of it unresolved.
			if !slices.Contains(all, h) {
				t.Errorf("%s has no packet that matched %s", who, h)
			}
		}
	}
	t.Logf("%d packets, %d lines, %d kinds of packets of %d unresolved", f.packets, len(f.lines), len(f.open), len(f.kernel))
	return f.packets, len(f.lines), len(f.open)
}

// TestEBTablesAtStart holds nftrace to reading the tables of ebtables that there are before any
// packet, and to making none: a packet would show that.
func TestEBTablesAtStart(t *testing.T) {
	needVM(t)
	if !hasEbtables() {
		t.Skip("this kernel has no ebtables but by way of nf_tables")
	}
	up(t, "bare")
	tmp := t.TempDir()
	shell(t.Context(), t, tmp, "setup", nil, truthSetup+"modprobe -a ebtable_broute ebtable_nat ebtable_filter\n")
	send := "ip netns exec c2 traffic udp-send -n 7 172.17.0.2:9\n"
	trace := func(name, script string) (hits map[string][][]string) {
		t.Helper()
		file := filepath.Join(tmp, name)
		args := []string{"-v", "--format", "json", "-o", file, "udp port 9", "--", "sh", "-ec", script}
		out, err := exec.CommandContext(t.Context(), "nftrace", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		hits, _, packets, err := ebTool(data, nil)
		if err != nil || packets != 7 {
			t.Errorf("%s: %d packets, want 7, %v\n%s", name, packets, err, out)
		}
		return hits
	}
	// Linux 5.10 makes tables when their modules are loaded, in all namespaces.
	if !strings.HasPrefix(read(t, "/proc/sys/kernel/osrelease"), "5.10.") {
		trace("first", send)
		if hits := trace("second", send); len(hits) != 0 {
			t.Errorf("there are tables, which nftrace must have made: %v", hits)
		}
	}
	rules := func(target string) string {
		return "ip netns exec h ebtables-legacy-restore <<'END'\n*filter\n:FORWARD ACCEPT\n-A FORWARD -p IPv4 -j CONTINUE\n-A FORWARD -p IPv4 -j " + target + "\nEND\n"
	}
	shell(t.Context(), t, tmp, "rules", nil, rules("ACCEPT"))
	// nftrace sleeps until the table that the packets met is gone.
	hits := trace("replaced", "kill -STOP $PPID\n"+send+rules("CONTINUE")+"kill -CONT $PPID\n")
	var got []string
	for _, runs := range hits {
		got = append(got, slices.Concat(runs...)...)
	}
	var want []string
	for range 7 {
		want = append(want, "filter:FORWARD:rule:1", "filter:FORWARD:rule:2")
	}
	if !slices.Equal(got, want) {
		t.Errorf("packets met %v, want %v", got, want)
	}
}

func addr(s string) string {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.String()
	}
	return s
}

// A wrong rule, one too many and one too few must be found.
func TestTruthEBFindsPlantedErrors(t *testing.T) {
	kernel, err := ebKernel([]string{
		"TRACE: f:FORWARD:2 IN=vethc2 OUT=vethc1 MAC source = 02:00:ac:11:00:03 MAC dest = 02:00:ac:11:00:02 proto = 0x0800 IP SRC=172.17.0.3 IP DST=172.17.0.2, IP tos=0x00, IP proto=17 SPT=5 DPT=7",
		"TRACE: f:U0:1 IN=vethc2 OUT=vethc1 MAC source = 02:00:ac:11:00:03 MAC dest = 02:00:ac:11:00:02 proto = 0x0800 IP SRC=172.17.0.3 IP DST=172.17.0.2, IP tos=0x00, IP proto=17 SPT=5 DPT=7",
	})
	if err != nil {
		t.Fatal(err)
	}
	const object = `{"steps":[{"kind":"table","netns_name":"h","time_ns":5,"family":"bridge","table":{"name":"filter","engine":"xtables","unresolved":"",
"before":{"family":"ip","ethertype":2048,"src":"172.17.0.3","dst":"172.17.0.2","proto":17,"sport":5,"dport":7},
"rules":[{"chain":"FORWARD","number":2},{"chain":"U0","number":1},{"chain":"U0","number":2,"is_end":true}]}}]}`
	for name, tt := range map[string]struct {
		text string
		ok   bool
	}{
		"the same":   {object, true},
		"wrong rule": {strings.Replace(object, `"number":2}`, `"number":3}`, 1), false},
		"too many":   {strings.Replace(object, `,"is_end":true`, "", 1), false},
		"too few":    {strings.Replace(object, `{"chain":"FORWARD","number":2},`, "", 1), false},
		"order":      {strings.Replace(object, `{"chain":"FORWARD","number":2},{"chain":"U0","number":1}`, `{"chain":"U0","number":1},{"chain":"FORWARD","number":2}`, 1), false},
		"unresolved": {strings.Replace(object, `"unresolved":""`, `"unresolved":"why"`, 1), false},
		"nothing":    {"", false},
	} {
		tool, open, _, err := ebTool([]byte(tt.text), nil)
		if err == nil {
			err = compareEB(kernel, tool, open, 2)
		}
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMadeOf(t *testing.T) {
	for _, tt := range []struct {
		log, runs string
		cpus      int
		want      bool
	}{
		{"", "", 1, true},
		{"a b a b c", "ab ab c", 1, true},
		{"a a b b c", "ab ab c", 1, false},
		{"a a b b c", "ab ab c", 2, true},
		{"a b c a b", "ab ab c", 1, false},
		{"a b c a b", "ab ab c", 2, true},
		{"c a b a b", "ab ab c", 2, false}, // nor the third before the first
		{"a a a b b b", "ab ab ab", 2, false},
		{"a x b a y b", "axb ayb", 2, true},
		{"a x a y b b", "axb ayb", 2, true},
		{"a x b a x b", "axb ayb", 2, false},
		{"a b b a", "ab ab", 2, false},
		{"a b a", "ab ab", 2, false},
		{"a b a b", "ab", 2, false},
		{"a a b a c b", "aab acb", 2, true}, // which of both goes on, only the end tells
	} {
		var runs [][]string
		for r := range strings.FieldsSeq(tt.runs) {
			runs = append(runs, strings.Split(r, ""))
		}
		if got := madeOf(strings.Fields(tt.log), nil, runs, tt.cpus); got != tt.want {
			t.Errorf("%q of %q, %d CPUs: got %v", tt.log, tt.runs, tt.cpus, got)
		}
	}
}
