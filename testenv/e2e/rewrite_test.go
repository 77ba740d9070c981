package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/testenv/oracle"
)

// churns are rulesets that are rewritten all the time: in generation n their only rule that
// matches is the n-th, and it marks the packet with n.
var churns = []struct {
	name    string
	program []string
	rules   func(n int) string
	chain   string // as trace lines have it
}{
	{"xtables", []string{"iptables-legacy-restore"}, func(n int) string {
		return "*mangle\n" + strings.Repeat("-A FORWARD -s 203.0.113.1 -j ACCEPT\n", n-1) +
			fmt.Sprintf("-A FORWARD -j MARK --set-mark %d\nCOMMIT\n", n)
	}, "mangle:FORWARD"},
	{"nf_tables", []string{"nft", "-f", "-"}, func(n int) string {
		return "table inet churn\ndelete table inet churn\ntable inet churn {\n\tchain forward {\n\t\ttype filter hook forward priority 0; policy accept;\n" +
			strings.Repeat("\t\tip saddr 203.0.113.1 accept\n", n-1) + fmt.Sprintf("\t\tmeta mark set %d\n\t}\n}\n", n)
	}, "inet:churn:forward"},
	{"iptables-nft", []string{"iptables-nft-restore"}, func(n int) string {
		return "*mangle\n" + strings.Repeat("-A FORWARD -s 203.0.113.1 -j ACCEPT\n", n-1) +
			fmt.Sprintf("-A FORWARD -j MARK --set-mark %d\nCOMMIT\n", n)
	}, "mangle:FORWARD"},
}

// TestChurn: while a table is rewritten as fast as that goes, each packet is told by the rules
// that it met, and nearly all are.
func TestChurn(t *testing.T) {
	needNftrace(t)
	for _, c := range churns {
		t.Run(c.name, func(t *testing.T) {
			up(t, "bare")
			tmp := t.TempDir()
			script, out := filepath.Join(tmp, "traffic"), filepath.Join(tmp, "out")
			traffic := "serve c1 udp-echo :7\nc2 udp-send -n 3001 -reply 172.17.0.2:7\n"
			if err := os.WriteFile(script, []byte(traffic), 0o644); err != nil {
				t.Fatal(err)
			}
			load := func(ctx context.Context, n int) error {
				cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", "h"}, c.program...)...)
				cmd.Stdin = strings.NewReader(c.rules(n))
				if out, err := cmd.CombinedOutput(); err != nil && ctx.Err() == nil {
					return fmt.Errorf("%v: %w: %s", c.program, err, out)
				}
				return nil
			}
			if err := load(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			type writing struct {
				generations int
				err         error
			}
			done := make(chan writing, 1)
			go func() {
				w := writing{generations: 1}
				for ctx.Err() == nil && w.err == nil {
					w.err = load(ctx, w.generations%13+1)
					w.generations++
				}
				done <- w
			}()
			cmd := exec.CommandContext(t.Context(), "nftrace", "-o", out, "--format", "trace", "udp", "--", "traffic", "script", script)
			stderr, err := cmd.CombinedOutput()
			stop()
			w := <-done
			if err != nil || w.err != nil || strings.Contains(string(stderr), "the command ended: ") {
				t.Fatalf("%v, %v\n%s", err, w.err, stderr)
			}
			checkChurn(t, c.chain, w.generations, read(t, out), string(stderr))
		})
	}
}

var (
	churnLine = regexp.MustCompile(`^TRACE: (\S+):(rule|policy):(\d+) .*?(?: MARK=0x([0-9a-f]+))?\s*$`)
	churnNot  = regexp.MustCompile(`^TRACE: (\S+):unresolved: (.*?) IN=`)
)

func checkChurn(t *testing.T, chain string, generations int, output, stderr string) {
	t.Helper()
	var told, unused, wrong, unresolved int
	met := map[string]bool{}
	causes := map[string]int{}
	for line := range strings.Lines(oracle.Without(output)) {
		if m := churnNot.FindStringSubmatch(line); m != nil {
			unresolved++
			causes[m[2]]++
			continue
		}
		m := churnLine.FindStringSubmatch(line)
		if m == nil || m[1] != chain {
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
	t.Logf("%d generations, %d runs told, %d of chains not in force, %d unresolved, %d wrong: %v\n%s", generations, told, unused, unresolved, wrong, causes, stderr)
	if generations < 13 || len(met) < 3 {
		t.Errorf("%d generations, %d kinds of which were met: that tests nothing", generations, len(met))
	}
	all := told + unresolved
	if all < 2*3001 {
		t.Errorf("%d runs, want %d", all, 2*3001)
	}
	// One in a thousand is the goal. But emulated CPUs take turns of 100 ms, in which one replaces
	// a ruleset while the other, on which nftrace is to read it, stands still; and one CPU
	// stands still when the host is busy. What is missed then is all packets of a generation.
	if runtime.NumCPU() == 1 && unresolved*50 > all {
		t.Errorf("%d of %d runs unresolved, want 2 %% at the most", unresolved, all)
	}
}
