package rulegen

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// nftHooks are the hooks of inet, ip and ip6, and what may stand there.
var nftHooks = []struct {
	hook       string
	in, out    bool // the interfaces that there are
	reject     bool
	nat        string // a statement of a nat chain without its address
	priorities []int
}{
	{"prerouting", true, false, false, "dnat", []int{-300, -150, -99, 10}},
	{"input", true, false, true, "", []int{-150, 0, 0, 50}},
	{"forward", true, true, true, "", []int{-150, 0, 0, 50}},
	{"output", false, true, true, "dnat", []int{-300, -150, 0, 50}},
	{"postrouting", false, true, false, "masquerade", []int{-150, 0, 99, 225}},
}

// NFT returns input of nft -f: tables of inet, ip and ip6 with base chains at all hooks,
// some of nat, user chains entered by jump, goto and verdict maps, and chains without a
// name. Jumps lead to later chains of the same base chain only.
func NFT(seed uint64) string {
	g := &nftGenerator{generator: generator{rand: rand.New(rand.NewPCG(seed, 12))}}
	for i, family := range []string{"inet", "ip", "ip6", "inet"} {
		if i > 0 && g.chance(20) {
			continue
		}
		g.table(family, fmt.Sprintf("t%d", i))
	}
	return g.b.String()
}

type nftGenerator struct {
	generator
	family string
	sets   []string // conditions with the table's sets
}

func (g *nftGenerator) line(depth int, format string, args ...any) {
	g.b.WriteString(strings.Repeat("\t", depth))
	fmt.Fprintf(&g.b, format+"\n", args...)
}

func (g *nftGenerator) table(family, name string) {
	g.family = family
	g.line(0, "table %s %s {", family, name)
	g.set()
	for i, h := range nftHooks {
		for n := range 1 + g.rand.IntN(2) {
			nat := h.nat != "" && n == 1
			base := fmt.Sprintf("%s%d", h.hook, n)
			var users []string
			for u := range g.rand.IntN(4) {
				users = append(users, fmt.Sprintf("%s-%c%d", base, "abcd"[u], g.rand.IntN(10)))
			}
			// A chain must be there before a rule leads to it.
			for u := len(users) - 1; u >= 0; u-- {
				g.chain(i, users[u], "", nat, users[u+1:])
			}
			kind, policy, priorities := "filter", "accept", h.priorities
			if nat {
				kind, priorities = "nat", []int{-150, -100, 50, 100} // behind conntrack
			} else if h.reject && g.chance(15) {
				policy = "drop"
			}
			g.chain(i, base, fmt.Sprintf("type %s hook %s priority %d; policy %s;", kind, h.hook, pick(&g.generator, priorities)+n, policy), nat, users)
		}
	}
	g.line(0, "}")
}

// set writes the sets that rules of the table look into.
func (g *nftGenerator) set() {
	g.sets = nil
	if g.family != "ip6" {
		g.line(1, "set hosts4 { type ipv4_addr; flags interval; elements = { 172.17.0.2, 10.211.55.0/30 }; }")
		g.sets = append(g.sets, "ip saddr @hosts4", "ip daddr @hosts4")
	}
	if g.family != "ip" {
		g.line(1, "set hosts6 { type ipv6_addr; elements = { fd00:17::2, fd00:55::1 }; }")
		g.sets = append(g.sets, "ip6 saddr @hosts6", "ip6 daddr @hosts6")
	}
	g.line(1, "set ports { type inet_proto . inet_service; elements = { tcp . 80, udp . %d, udp . 12345 }; }", pick(&g.generator, []int{7, 53, 8080}))
	g.line(1, "set seen { type inet_service; size 64; flags dynamic; }")
	g.sets = append(g.sets, "meta l4proto . th dport @ports", "update @seen { udp dport }")
}

// chain writes a chain with rules; those of a base chain begin with a jump to each user chain.
func (g *nftGenerator) chain(hook int, name, declaration string, nat bool, later []string) {
	g.line(1, "chain %s {", name)
	if declaration != "" {
		g.line(2, "%s", declaration)
		for _, l := range later {
			if g.chance(60) {
				g.line(2, "%sjump %s", g.match(hook), l)
			}
		}
	}
	for range g.rand.IntN(6) {
		g.rule(2, hook, nat, later)
	}
	g.line(1, "}")
}

func (g *nftGenerator) rule(depth, hook int, nat bool, later []string) {
	h := nftHooks[hook]
	match := g.match(hook)
	if len(later) > 0 && g.chance(30) {
		to := pick(&g.generator, later)
		switch g.rand.IntN(4) {
		case 0:
			g.line(depth, "%sgoto %s", match, to)
		case 1:
			g.line(depth, "meta l4proto vmap { tcp : jump %s, udp : %s, icmp : goto %s, ipv6-icmp : return }", to,
				pick(&g.generator, []string{"accept", "continue", "return", "jump " + to}), to)
		default:
			g.line(depth, "%sjump %s", match, to)
		}
		return
	}
	if depth == 2 && g.chance(10) {
		g.line(depth, "%s%s {", match, pick(&g.generator, []string{"jump", "goto"}))
		for range 1 + g.rand.IntN(3) {
			g.rule(depth+1, hook, nat, nil)
		}
		g.line(depth, "}")
		return
	}
	statements := []string{"counter", "counter", "accept", "return", "meta mark set " + fmt.Sprint(g.rand.IntN(4)), "ct mark set meta mark"}
	switch {
	case nat && h.nat == "masquerade":
		statements = append(statements, "masquerade", "counter masquerade")
	case nat && h.nat == "dnat":
		statements = append(statements, g.dnat())
	default:
		statements = append(statements, "counter drop", "counter comment \"drop; accept\"", "log group 7 return")
		if h.reject {
			statements = append(statements, "reject", "meta l4proto tcp reject with tcp reset")
		}
	}
	s := pick(&g.generator, statements)
	if strings.HasPrefix(s, "dnat ") {
		match = "meta l4proto { tcp, udp } " // of no family
	}
	g.line(depth, "%s%s", match, s)
}

func (g *nftGenerator) dnat() string {
	switch {
	case g.family == "ip":
		return "dnat to 172.17.0.2"
	case g.family == "ip6":
		return "dnat to fd00:17::2"
	case g.chance(50):
		return "dnat ip to 172.17.0.2"
	}
	return "dnat ip6 to fd00:17::2"
}

// match returns the conditions of a rule, with a blank behind.
func (g *nftGenerator) match(hook int) string {
	h := nftHooks[hook]
	var b strings.Builder
	add := func(percent int, prefix string, values ...string) {
		if g.chance(percent) {
			b.WriteString(prefix + pick(&g.generator, values) + " ")
		}
	}
	if g.chance(20) {
		b.WriteString(pick(&g.generator, g.sets) + " ")
	} else {
		add(25, "meta l4proto ", "tcp", "udp", "{ icmp, ipv6-icmp }", "!= tcp", "{ tcp, udp }")
		add(15, "th dport ", "80", "{ 53, 7, 81 }", "!= 12345", "1-1023")
	}
	if h.in {
		add(15, "iifname ", "\"docker0\"", "\"eth0\"", "!= \"lo\"", "{ \"docker0\", \"eth0\" }")
	}
	if h.out {
		add(15, "oifname ", "\"docker0\"", "\"eth*\"", "!= \"lo\"")
	}
	add(15, "ct state ", "new", "established,related", "{ new, established }", "invalid")
	add(10, "meta mark ", "0", "1", "!= 2", "and 2 == 2")
	add(8, "numgen ", "random mod 2 == 0", "inc mod 3 == 1", "inc mod 5 != 2")
	return b.String()
}
