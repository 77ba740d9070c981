package e2e

import (
	"errors"
	"fmt"
	"io"
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
)

type churn struct {
	name    string
	program []string
	rules   func(n int) string
	chain   string // as trace lines have it
}

// churns are rulesets that are rewritten all the time: in generation n their only rule that
// matches is the n-th, and it marks the packet with n. Each is one transaction of the program,
// which reads one after the other.
var churns = []churn{
	{"xtables", []string{"iptables-legacy-restore"}, churnTables, "mangle:FORWARD"},
	{"nf_tables", []string{"nft", "-i"}, func(n int) string {
		return "table inet churn; delete table inet churn; table inet churn { chain forward { type filter hook forward priority 0; policy accept; " +
			strings.Repeat("ip saddr 203.0.113.1 accept; ", n-1) + fmt.Sprintf("meta mark set %d; }; }\n", n)
	}, "inet:churn:forward"},
	{"iptables-nft", []string{"iptables-nft-restore"}, churnTables, "mangle:FORWARD"},
}

func churnTables(n int) string {
	return "*mangle\n" + strings.Repeat("-A FORWARD -s 203.0.113.1 -j ACCEPT\n", n-1) +
		fmt.Sprintf("-A FORWARD -j MARK --set-mark %d\nCOMMIT\n", n)
}

// TestChurn: while a table is rewritten all the time, each packet is told by the rules
// that it met, and nearly all are. Where nftrace does not run in the namespace, it learns only from
// the packets that a ruleset is rewritten there.
func TestChurn(t *testing.T) {
	needNftrace(t)
	// How many runs can be told is a matter of time: an emulated CPU that stands still for a moment
	// keeps nftrace from reading a ruleset before the next one is there. So only make test-churn,
	// where the guest's clock counts instructions, holds the share to anything: a generation lives 19 ms
	// there, which makes 50 a second, and CI's run is too short for a single one that nftrace misses. By
	// another clock all that is told must be true.
	packets, most, life := 307, 1., 100*time.Millisecond
	if s := os.Getenv("NFTRACE_CHURN"); s != "" {
		var err error
		if packets, err = strconv.Atoi(s); err != nil {
			t.Fatalf("NFTRACE_CHURN: %v", err)
		}
		most, life = 0.001, 19*time.Millisecond
	}
	host := []string{"nsenter", "--net=/run/netns/h"}
	for _, c := range churns {
		t.Run(c.name, func(t *testing.T) { c.test(t, packets, most, life, host) })
	}
	t.Run("elsewhere", func(t *testing.T) { churns[1].test(t, packets, most, life, nil) })
}

// test runs nftrace where the prefix leads; of all runs of the chain, most may be unresolved. A
// generation is replaced after its life.
func (c *churn) test(t *testing.T, packets int, most float64, life time.Duration, where []string) {
	up(t, "bare")
	tmp := t.TempDir()
	script, out, ready := filepath.Join(tmp, "traffic"), filepath.Join(tmp, "out"), filepath.Join(tmp, "ready")
	traffic := fmt.Sprintf("serve c1 udp-echo :7\nc2 udp-send -n %d -every 20ms -reply 172.17.0.2:7\n", packets)
	if err := os.WriteFile(script, []byte(traffic), 0o644); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	write := func() *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "ip", append([]string{"netns", "exec", "h"}, c.program...)...)
		cmd.Stderr = &said
		return cmd
	}
	first := write()
	first.Stdin = strings.NewReader(c.rules(1))
	if err := first.Run(); err != nil {
		t.Fatal(err)
	}

	p := spawn(t, "", nil, append(slices.Clone(where), "nftrace", "--ready-file", ready, "-o", out, "--format", "trace", "udp", "--", "traffic", "script", script)...)
	p.ready = ready
	p.waitReady()

	writer := write()
	stdin, err := writer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	generations, start := 0, time.Now()
	// No ticker, which would make up for a late tick by a generation that lives shorter.
	over := time.NewTimer(life)
	defer over.Stop()
writing:
	for {
		if _, err := io.WriteString(stdin, c.rules(generations%13+1)); err != nil {
			t.Error(err)
		}
		generations++
		over.Reset(life)
		select {
		case <-over.C:
		case <-p.ended:
			break writing
		}
	}
	took := time.Since(start)
	if err := errors.Join(stdin.Close(), writer.Wait()); err != nil || strings.Contains(said.String(), "Error") {
		t.Errorf("%v: %s", err, said.String())
	}
	if p.status() != 0 || strings.Contains(p.stderr.String(), "the command ended: ") {
		t.Fatal(p.stderr.String())
	}
	t.Logf("%d generations in %v", generations, took)
	if generations < 13 {
		t.Error("that tests nothing")
	}
	c.check(t, packets, most, read(t, out), p.stderr.String())
}

var (
	churnLine = regexp.MustCompile(`^TRACE: (\S+):(rule|policy):(\d+) .*?(?: MARK=0x([0-9a-f]+))?\s*$`)
	churnNot  = regexp.MustCompile(`^TRACE: (\S+):unresolved: (.*?) IN=`)
)

func (c *churn) check(t *testing.T, packets int, most float64, output, stderr string) {
	t.Helper()
	var told, unused, wrong, unresolved int
	met := map[string]bool{}
	causes := map[string]int{}
	for line := range strings.Lines(oracle.Without(output)) {
		if m := churnNot.FindStringSubmatch(line); m != nil {
			// Of a legacy table that is not known, the runs at other hooks are unresolved, too.
			if !strings.HasSuffix(m[1], ":FORWARD") {
				continue
			}
			unresolved++
			causes[m[2]]++
			continue
		}
		m := churnLine.FindStringSubmatch(line)
		if m == nil || m[1] != c.chain {
			continue
		}
		n, err := strconv.Atoi(m[3])
		if err != nil {
			t.Fatal(err)
		}
		mark, _ := strconv.ParseUint(m[4], 16, 32) // none is 0
		if m[2] == "policy" && n == 1 {
			unused++ // of a chain of nf_tables that is not in force
		} else if m[2] == "policy" {
			told++
			met[m[4]] = true
			if int(mark) != n-1 {
				wrong++
				t.Errorf("the policy is said to be the %dth, and the packet was marked by generation %d: %s", n, mark, line)
			}
		}
	}
	t.Logf("%d runs told, %d of chains not in force, %d unresolved, %d wrong: %v\n%s", told, unused, unresolved, wrong, causes, stderr)
	if len(met) < 3 {
		t.Errorf("%d of 13 kinds of generations were met: that tests nothing", len(met))
	}
	all := told + unresolved
	if all < 2*packets {
		t.Errorf("%d runs, want %d", all, 2*packets)
	}
	if float64(unresolved) > most*float64(all) {
		t.Errorf("%d of %d runs unresolved, want %v %% at the most", unresolved, all, 100*most)
	}
}
