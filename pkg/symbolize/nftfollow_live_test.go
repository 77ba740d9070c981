package symbolize

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestNFTFollowLive holds what the kernel's notifications tell of each of many commits against
// what it lists behind them.
func TestNFTFollowLive(t *testing.T) {
	s, a, _ := inNamespaces(t, "nsenter -n -t $A ip link add d0 type dummy; nsenter -n -t $A ip link add d1 type dummy")
	ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	run := func(stdin string, program ...string) error {
		return ns.Do(func() error {
			cmd := exec.Command(program[0], program[1:]...)
			cmd.Stdin = strings.NewReader(stdin)
			out, err := cmd.CombinedOutput()
			if err != nil {
				return fmt.Errorf("%q: %w: %s\n%s", program, err, out, stdin)
			}
			return nil
		})
	}
	const first = "table inet t0 {\n chain c0 { type filter hook input priority 0; counter; accept; }\n}"
	if err := run(first, "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	f, r, err := FollowNFT(ns, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { f.Close() }()
	g := nftGenerator{rand.New(rand.NewPCG(13, 17))}
	commits, gaps := 0, 0
	for round := range 151 {
		var err error
		if round%13 == 12 {
			err = run(g.iptables(), "iptables-nft-restore")
		} else {
			err = run(g.batch(r), "nft", "-f", "-")
		}
		if err != nil {
			// The kernel did nothing of it: a chain is still in use, for example.
			continue
		}
		want, err := ReadNFT(ns, nil)
		if err != nil {
			t.Fatal(err)
		}
		for r.Gen != want.Gen {
			next, err := f.Next(time.Now().Add(10 * time.Second))
			if errors.Is(err, errNFTGap) {
				gaps++
				f.Close()
				if f, r, err = FollowNFT(ns, nil); err != nil {
					t.Fatal(err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			r = next
			commits++
		}
		if got, want := outline(r), outline(want); got != want {
			t.Fatalf("round %d: followed\n%s\nlisted\n%s", round, got, want)
		}
	}
	t.Logf("%d commits followed, %d not", commits, gaps)
	if commits < 101 || gaps > commits/7 {
		t.Error("that is not enough")
	}
	if _, err := f.Next(time.Now()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing more came: %v", err)
	}
}

// outline is all that is told of a ruleset, but texts.
func outline(r *NFTRuleset) string {
	var b bytes.Buffer
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "table %d %s %d %v\n", t.Family, t.Name, t.Handle, t.Compat)
		for _, c := range t.Chains {
			fmt.Fprintf(&b, "  chain %s %d %v %s %d %d %d\n", c.Name, c.Handle, c.Base, c.Type, c.Hook, c.Priority, c.Policy)
			for _, rule := range c.Rules {
				fmt.Fprintf(&b, "    %d: %d %q %q\n", rule.Num, rule.Handle, rule.Target, rule.native)
				if r.Rule(t.Handle, rule.Handle) != rule || r.Chain(t.Handle, c.Handle) != c {
					fmt.Fprintf(&b, "    is not found\n")
				}
			}
		}
	}
	return b.String()
}

// nftGenerator makes commits.
type nftGenerator struct{ *rand.Rand }

func (g nftGenerator) pick(s ...string) string { return s[g.IntN(len(s))] }

func (g nftGenerator) rule() string {
	return g.pick("counter", "accept", "drop", "meta mark set 7 counter", "ip saddr 10.0.0.1 counter drop",
		"jump { counter; accept; }", "ip daddr 10.0.0.2 goto { drop; }", "jump "+g.chain(), "limit rate 7/second counter",
		"ip protocol vmap { tcp : accept, udp : drop }", "log prefix \"x\" counter")
}

func (g nftGenerator) chain() string { return g.pick("c0", "c1", "c2", "c3") }

// batch is one commit, made for what r has.
func (g nftGenerator) batch(r *NFTRuleset) string {
	var b strings.Builder
	for range 1 + g.IntN(7) {
		table := g.pick("inet t0", "inet t1", "ip t2", "netdev t3")
		chain := g.chain()
		// Many of these need the table or the chain.
		fmt.Fprintf(&b, "add table %s\nadd chain %s %s\n", table, table, chain)
		var old []*NFTRule
		for _, t := range r.Tables {
			for _, c := range t.Chains {
				if strings.HasSuffix(table, " "+t.Name) && c.Name == chain {
					old = c.Rules
				}
			}
		}
		handle := 0
		if len(old) > 0 {
			handle = int(old[g.IntN(len(old))].Handle)
		}
		switch n := g.IntN(16); {
		case n < 3:
			for range 1 + g.IntN(3) {
				fmt.Fprintf(&b, "add rule %s %s %s\n", table, chain, g.rule())
			}
		case n < 6:
			for range 1 + g.IntN(3) {
				fmt.Fprintf(&b, "insert rule %s %s %s\n", table, chain, g.rule())
			}
		case n < 11 && handle != 0:
			switch g.IntN(4) {
			case 0:
				fmt.Fprintf(&b, "add rule %s %s handle %d %s\n", table, chain, handle, g.rule())
				fmt.Fprintf(&b, "add rule %s %s handle %d %s\n", table, chain, handle, g.rule())
			case 1:
				fmt.Fprintf(&b, "insert rule %s %s handle %d %s\n", table, chain, handle, g.rule())
			case 2:
				fmt.Fprintf(&b, "replace rule %s %s handle %d %s\n", table, chain, handle, g.rule())
			case 3:
				fmt.Fprintf(&b, "delete rule %s %s handle %d\n", table, chain, handle)
			}
			return b.String() // another use of the handle would fail
		case n == 11:
			fmt.Fprintf(&b, "flush chain %s %s\nadd rule %s %s %s\n", table, chain, table, chain, g.rule())
		case n == 12:
			fmt.Fprintf(&b, "flush chain %s %s\ndelete chain %s %s\n", table, chain, table, chain)
		case n == 13:
			fmt.Fprintf(&b, "delete table %s\n", table)
			if g.IntN(2) == 0 {
				fmt.Fprintf(&b, "add table %s\nadd chain %s %s\nadd rule %s %s counter\n", table, table, chain, table, chain)
			}
		case n == 14 && table != "netdev t3":
			fmt.Fprintf(&b, "add chain %s base { type filter hook forward priority 0; policy %s; }\nadd rule %s base %s\n",
				table, g.pick("accept", "drop"), table, g.rule())
		case n == 14:
			fmt.Fprintf(&b, "add chain %s base { type filter hook ingress device %s priority 0; }\nadd rule %s base counter\n",
				table, g.pick("d0", "d1"), table)
		default:
			fmt.Fprintf(&b, "add set %s s { type ipv4_addr; }\nadd element %s s { 10.0.0.%d }\n", table, table, g.IntN(13))
		}
	}
	return b.String()
}

func (g nftGenerator) iptables() string {
	var b strings.Builder
	b.WriteString("*filter\n:INPUT " + g.pick("ACCEPT", "DROP") + "\n:U -\n")
	for range g.IntN(7) {
		fmt.Fprintf(&b, "-A %s -s 10.0.0.%d -j %s\n", g.pick("INPUT", "U", "FORWARD"), 1+g.IntN(13), g.pick("ACCEPT", "DROP", "LOG"))
	}
	b.WriteString("COMMIT\n")
	return b.String()
}
