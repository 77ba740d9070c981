package rulegen

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// arpHooks are the chains of the one table of arptables-legacy, and the devices that there are.
var arpHooks = []struct {
	chain    string
	in, out  []string
	classify bool
}{
	{chain: "INPUT", in: []string{"docker0", "eth0", "docker+", "lo"}},
	{chain: "OUTPUT", out: []string{"docker0", "eth0", "eth+", "lo"}, classify: true},
	// What is bridged, with its ports.
	{chain: "FORWARD", in: []string{"vethc1", "vethc2", "veth+", "eth0"}, out: []string{"vethc1", "vethc2", "veth+"}, classify: true},
}

// ARP returns arguments of arptables-legacy, a command a line: chains that are entered by
// jump, some from all built-in ones, all conditions that arptables has, and all targets.
// Jumps lead to later chains only.
func ARP(seed uint64) string {
	g := &arpGenerator{generator{rand: rand.New(rand.NewPCG(seed, 3))}}
	names := func(prefix string, n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("%s-%c%d", prefix, "abcd"[i], g.rand.IntN(10)))
			fmt.Fprintf(&g.b, "-N %s\n", out[i])
		}
		return out
	}
	shared := names("any", g.rand.IntN(3))
	for hook, h := range arpHooks {
		later := append(names(h.chain, g.rand.IntN(4)), shared...)
		for i, c := range later[:len(later)-len(shared)] {
			g.rules(hook, c, g.rand.IntN(5), later[i+1:])
		}
		// Every chain is to be reached, and some twice.
		for _, to := range later {
			for range 1 + g.rand.IntN(2) {
				if g.chance(60) {
					fmt.Fprintf(&g.b, "-A %s%s -j %s\n", h.chain, g.match(hook), to)
				}
			}
		}
		g.rules(hook, h.chain, 1+g.rand.IntN(5), later)
		if g.chance(20) {
			fmt.Fprintf(&g.b, "-P %s DROP\n", h.chain)
		}
	}
	for i, c := range shared {
		g.rules(-1, c, 1+g.rand.IntN(4), shared[i+1:])
	}
	return g.b.String()
}

type arpGenerator struct{ generator }

// rules appends n rules to a chain that is reached from one hook, or from all if that is -1.
func (g *arpGenerator) rules(hook int, chain string, n int, later []string) {
	for range n {
		counters := ""
		if g.chance(5) {
			counters = fmt.Sprintf(" -c %d %d", 1+g.rand.IntN(1000), 28*g.rand.IntN(1000))
		}
		match := g.match(hook)
		fmt.Fprintf(&g.b, "-A %s%s%s%s\n", chain, counters, match, g.target(hook, match, later))
	}
}

// match returns the conditions of a rule.
func (g *arpGenerator) match(hook int) string {
	var b strings.Builder
	add := func(percent int, option string, values ...string) {
		if len(values) > 0 && g.chance(percent) {
			not := ""
			if g.chance(25) {
				not = "! "
			}
			fmt.Fprintf(&b, " %s%s %s", not, option, pick(&g.generator, values))
		}
	}
	in, out := []string{"docker0", "veth+", "eth0"}, []string{"docker0", "veth+", "eth0"}
	if hook >= 0 {
		in, out = arpHooks[hook].in, arpHooks[hook].out
	}
	add(15, "-i", in...)
	add(15, "-o", out...)
	add(20, "-s", "172.17.0.3", "172.17.0.77", "172.17.0.0/16", "10.211.55.8", "10.211.55.0/24", "172.17.0.1/255.255.0.253")
	add(20, "-d", "172.17.0.1", "172.17.0.2/31", "172.17.0.0/16", "10.211.55.8", "10.211.55.88/29", "10.0.55.0/255.0.255.0")
	add(12, "--source-mac", "02:00:ac:11:00:03", "02:00:0a:d3:37:08", "02:00:ac:11:00:00/ff:ff:ff:ff:00:00", "02:00:00:00:00:01/ff:ff:00:00:00:01")
	add(12, "--destination-mac", "00:00:00:00:00:00", "02:00:ac:11:00:03", "02:00:ac:00:00:00/ff:ff:ff:00:00:00", "00:00:00:00:00:03/00:00:00:00:00:0f")
	add(20, "--opcode", "1", "2", "1/1", "2/3", "8")
	// What all packets of the tests have, and now and then what none has.
	for _, conditions := range [][]string{
		{"--h-length 6", "--h-length 6/15", "! --h-length 4", "--h-length 4/4", "! --h-length 6"},
		{"--h-type 1", "--h-type 1/0xff", "! --h-type 6", "! --h-type 1/2", "--h-type 6"},
		{"--proto-type 0x800", "--proto-type 0x800/0xff00", "! --proto-type 0x806", "! --proto-type 0x800/0xff"},
	} {
		if g.chance(12) {
			b.WriteString(" " + pick(&g.generator, conditions))
		}
	}
	return b.String()
}

// target returns what a rule does; without one it counts.
func (g *arpGenerator) target(hook int, match string, later []string) string {
	if len(later) > 0 && g.chance(30) {
		return " -j " + pick(&g.generator, later)
	}
	targets := []string{"", "", "", "", " -j RETURN", " -j RETURN", " -j ACCEPT", "DROP", "MARK", "MARK", "mangle", "mangle"}
	if hook >= 0 && arpHooks[hook].classify {
		targets = append(targets, " -j CLASSIFY --set-class 1:"+fmt.Sprint(g.rand.IntN(20)))
	}
	switch t := pick(&g.generator, targets); t {
	case "DROP":
		if g.chance(50) {
			return " -j DROP"
		}
		return ""
	case "MARK":
		return fmt.Sprintf(" -j MARK --%s-mark %#x", pick(&g.generator, []string{"set", "and", "or"}), g.rand.IntN(0x20))
	case "mangle":
		return g.mangle(match)
	default:
		return t
	}
}

func (g *arpGenerator) mangle(match string) string {
	var b strings.Builder
	add := func(option string, values ...string) {
		if g.chance(30) {
			b.WriteString(" --mangle-" + option + " " + pick(&g.generator, values))
		}
	}
	length := ""
	if !strings.Contains(match, "--h-length") {
		add("mac-s", "02:00:ac:11:00:03", "02:00:00:00:00:07")
		add("mac-d", "02:00:ac:11:00:02", "02:00:00:00:00:07")
		if b.Len() > 0 {
			length = " --h-length 6" // which arptables wants to see
		}
	}
	add("ip-s", "172.17.0.3", "10.211.55.200")
	add("ip-d", "172.17.0.1", "10.211.55.8", "10.211.55.200")
	if b.Len() == 0 {
		b.WriteString(" --mangle-ip-s 172.17.0.77")
	}
	verdict := pick(&g.generator, []string{"", "ACCEPT", "DROP", "CONTINUE", "CONTINUE", "CONTINUE", "CONTINUE"})
	if verdict != "" {
		verdict = " --mangle-target " + verdict
	}
	return length + " -j mangle" + b.String() + verdict
}
