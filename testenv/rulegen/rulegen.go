package rulegen

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Options say where rules are to be loaded. The zero value is IPv4 for the
// topology "docker".
type Options struct {
	// IPv6 makes rules for ip6tables.
	IPv6 bool
	// Lossless leaves out what ends or turns a packet before its time: DROP,
	// REJECT, DNAT. Policies are ACCEPT.
	Lossless bool
	// Ambiguous lets a rule depend on chance or on marks even if a packet may meet it
	// twice. Which of the two times it matched is then no matter of counters.
	Ambiguous bool
	// Rules is about the number of rules in each table; 0 is 12.
	Rules int
}

// hooks are the base chains of each table, in the order of the kernel.
var hooks = []struct {
	table  string
	chains []string
}{
	{"raw", []string{"PREROUTING", "OUTPUT"}},
	{"mangle", []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}},
	{"nat", []string{"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}},
	{"filter", []string{"INPUT", "FORWARD", "OUTPUT"}},
	{"security", []string{"INPUT", "FORWARD", "OUTPUT"}},
}

type generator struct {
	rand  *rand.Rand
	o     Options
	b     strings.Builder
	table string
	// entered is how often a packet may enter each chain of the table.
	entered map[string]int
	chain   string // that is being written
}

// Generate returns input for iptables-restore or ip6tables-restore, with all
// five tables.
func Generate(seed uint64, o Options) string {
	if o.Rules == 0 {
		o.Rules = 12
	}
	family := uint64(4)
	if o.IPv6 {
		family = 6
	}
	g := &generator{rand: rand.New(rand.NewPCG(seed, family)), o: o}
	for _, h := range hooks {
		g.writeTable(h.table, h.chains)
	}
	return g.b.String()
}

func (g *generator) chance(percent int) bool { return g.rand.IntN(100) < percent }

func pick[T any](g *generator, list []T) T { return list[g.rand.IntN(len(list))] }

func (g *generator) writeTable(table string, base []string) {
	g.table = table
	g.entered = map[string]int{}
	fmt.Fprintf(&g.b, "*%s\n", table)
	for _, c := range base {
		policy := "ACCEPT"
		if table == "filter" && !g.o.Lossless && g.chance(15) {
			policy = "DROP"
		}
		fmt.Fprintf(&g.b, ":%s %s [0:0]\n", c, policy)
	}
	// User chains are made for one base chain: what a chain may hold depends
	// on the hook it is reached from. Jumps go to later chains of the same
	// base chain only.
	type chain struct {
		name, hook string
		user       bool
		later      []string
	}
	var chains []chain
	for _, hook := range base {
		n := g.rand.IntN(4)
		var users []string
		for i := range n {
			users = append(users, fmt.Sprintf("%s-%c%d", hook, "abcd"[i], g.rand.IntN(10)))
			fmt.Fprintf(&g.b, ":%s - [0:0]\n", users[i])
		}
		chains = append(chains, chain{hook, hook, false, users})
		for i, u := range users {
			chains = append(chains, chain{u, hook, true, users[i+1:]})
		}
	}
	for _, c := range chains {
		g.chain = c.name
		if !c.user {
			g.entered[c.name] = 1
		}
		n := g.rand.IntN(2*max(g.o.Rules/len(chains), 1) + 1)
		if !c.user && len(c.later) > 0 {
			n++
		}
		for i := range n {
			// Every user chain is to be reached: its base chain begins with a jump.
			if i == 0 && !c.user && len(c.later) > 0 {
				fmt.Fprintf(&g.b, "-A %s -j %s\n", c.name, c.later[0])
				g.entered[c.later[0]]++
				// Entered twice, now and then.
				if g.chance(40) {
					fmt.Fprintf(&g.b, "-A %s%s -j %s\n", c.name, g.match(c.hook, ""), c.later[0])
					g.entered[c.later[0]]++
				}
				continue
			}
			proto := g.proto()
			target := g.target(c.hook, c.later, &proto)
			fmt.Fprintf(&g.b, "-A %s%s%s\n", c.name, g.match(c.hook, proto), target)
		}
	}
	g.b.WriteString("COMMIT\n")
}

// proto returns a protocol to match on, or nothing.
func (g *generator) proto() string {
	icmp := "icmp"
	if g.o.IPv6 {
		icmp = "ipv6-icmp"
	}
	return pick(g, []string{"", "", "", icmp, "udp", "tcp"})
}

// match returns the conditions of a rule.
func (g *generator) match(hook, proto string) string {
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, " "+format, args...) }
	not := func() string {
		if g.chance(25) {
			return "! "
		}
		return ""
	}
	if g.chance(25) {
		add("%s-s %s", not(), g.network())
	}
	if g.chance(25) {
		add("%s-d %s", not(), g.network())
	}
	if hook != "OUTPUT" && hook != "POSTROUTING" && g.chance(25) {
		add("%s-i %s", not(), pick(g, []string{"docker0", "eth0", "docker+", "lo"}))
	}
	if hook != "PREROUTING" && hook != "INPUT" && g.chance(25) {
		add("%s-o %s", not(), pick(g, []string{"docker0", "eth0", "eth+", "lo"}))
	}
	if proto != "" {
		add("-p %s", proto)
	}
	if (proto == "udp" || proto == "tcp") && g.chance(60) {
		add("-m %s", proto)
		if g.chance(50) {
			add("%s--dport %s", not(), pick(g, []string{"53", "80", "8080", "12345", "1:1023", "1024:65535"}))
		} else {
			add("%s--sport %s", not(), pick(g, []string{"80", "12345", "1:1023", "1024:65535"}))
		}
	}
	// Raw comes before conntrack.
	if g.table != "raw" && g.chance(25) {
		add("-m conntrack %s--ctstate %s", not(), pick(g, []string{"NEW", "ESTABLISHED", "RELATED,ESTABLISHED", "INVALID", "NEW,ESTABLISHED"}))
	}
	// All that is left may change between two visits of one packet.
	if g.entered[g.chain] > 1 && !g.o.Ambiguous {
		return b.String()
	}
	if g.chance(15) {
		add("-m mark %s--mark %s", not(), pick(g, []string{"0x0", "0x1", "0x10/0xf0", "0x2/0x3"}))
	}
	if g.chance(10) {
		add("-m limit --limit %d/sec --limit-burst %d", 1+g.rand.IntN(100), 1+g.rand.IntN(20))
	}
	if g.chance(15) {
		if g.chance(50) {
			every := 2 + g.rand.IntN(4)
			add("-m statistic --mode nth --every %d --packet %d", every, g.rand.IntN(every))
		} else {
			add("-m statistic --mode random --probability 0.%d", 1+g.rand.IntN(9))
		}
	}
	if g.chance(10) {
		add("-m comment --comment \"rule %d: it's \\\"quoted\\\"\"", g.rand.IntN(100))
	}
	return b.String()
}

func (g *generator) network() string {
	if g.o.IPv6 {
		return pick(g, []string{"fd00:17::2/128", "fd00:17::3/128", "fd00:17::/64", "fd00:55::1/128", "fd00:55::/64", "::/0"})
	}
	return pick(g, []string{"172.17.0.2/32", "172.17.0.3/32", "172.17.0.0/16", "10.211.55.1/32", "10.211.55.0/24", "127.0.0.0/8"})
}

// target returns what a rule does. It may ask for a protocol.
func (g *generator) target(hook string, later []string, proto *string) string {
	if len(later) > 0 && g.chance(35) {
		flag := "-j"
		if g.chance(30) {
			flag = "-g"
		}
		to := pick(g, later)
		g.entered[to] += g.entered[g.chain]
		return fmt.Sprintf(" %s %s", flag, to)
	}
	if g.chance(20) {
		return " -j RETURN"
	}
	// No target: the rule only counts, and the packet goes on.
	targets := []string{"", "", " -j ACCEPT", " -j NFLOG --nflog-group 7"}
	value := func() int { return g.rand.IntN(4) }
	switch g.table {
	case "raw":
		targets = append(targets, fmt.Sprintf(" -j MARK --set-xmark 0x%x/0xf", value()))
		if !g.o.Lossless {
			targets = append(targets, " -j CT --notrack")
		}
	case "mangle":
		targets = append(targets,
			fmt.Sprintf(" -j MARK --set-xmark 0x%x/0xffffffff", value()),
			fmt.Sprintf(" -j MARK --or-mark 0x%x", value()<<4),
			" -j CONNMARK --save-mark", " -j CONNMARK --restore-mark",
			fmt.Sprintf(" -j CONNMARK --set-xmark 0x%x/0xff", value()))
		if g.o.IPv6 {
			targets = append(targets, fmt.Sprintf(" -j HL --hl-set %d", 50+value()), " -j DSCP --set-dscp 0x0a")
			if hook == "PREROUTING" {
				targets = append(targets, " -j TEE --gateway fd00:17::2")
			}
		} else {
			targets = append(targets, fmt.Sprintf(" -j TTL --ttl-set %d", 50+value()), " -j TOS --set-tos 0x10/0x3f", " -j DSCP --set-dscp 0x0a")
			if hook == "PREROUTING" {
				targets = append(targets, " -j TEE --gateway 172.17.0.2")
			}
		}
	case "nat":
		switch hook {
		case "PREROUTING", "OUTPUT":
			if !g.o.Lossless {
				to := "172.17.0.2"
				if g.o.IPv6 {
					to = "fd00:17::2"
				}
				targets = append(targets, " -j DNAT --to-destination "+to)
			}
		case "POSTROUTING":
			self := "10.211.55.8"
			if g.o.IPv6 {
				self = "fd00:55::8"
			}
			targets = append(targets, " -j MASQUERADE", " -j SNAT --to-source "+self)
		}
	case "filter":
		if !g.o.Lossless {
			targets = append(targets, " -j DROP")
			if g.o.IPv6 {
				targets = append(targets, " -j REJECT --reject-with icmp6-port-unreachable", " -j REJECT --reject-with icmp6-adm-prohibited")
			} else {
				targets = append(targets, " -j REJECT --reject-with icmp-port-unreachable", " -j REJECT --reject-with icmp-host-prohibited")
			}
			if g.chance(30) {
				*proto = "tcp"
				targets = append(targets, " -j REJECT --reject-with tcp-reset")
				return targets[len(targets)-1]
			}
		}
	case "security":
		targets = append(targets, "")
		if !g.o.Lossless {
			targets = append(targets, " -j DROP")
		}
	}
	return pick(g, targets)
}
