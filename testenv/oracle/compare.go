package oracle

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A Line is a TRACE line, taken apart as far as telling packets apart needs.
type Line struct {
	Text string // from "TRACE: " on, without blanks at the end
	Rule string // table:chain:type:number
	// Flow names the packet as it is at this line: addresses and ports, too.
	Flow string
	// Packet names the packet by what NAT leaves alone: protocol, IP ID, length,
	// TCP's numbers, ICMP's type and sequence.
	Packet string
}

// ParseLine takes a line apart; anything before "TRACE: " is dropped.
func ParseLine(s string) (Line, error) {
	i := strings.Index(s, "TRACE: ")
	if i < 0 {
		return Line{}, fmt.Errorf("not a TRACE line: %q", s)
	}
	l := Line{Text: strings.TrimRight(s[i:], " \t\r\n")}
	fields := strings.Fields(strings.TrimPrefix(l.Text, "TRACE: "))
	if len(fields) == 0 || strings.Count(fields[0], ":") < 3 {
		return Line{}, fmt.Errorf("not table:chain:type:number: %q", s)
	}
	l.Rule = fields[0]
	var flow, packet []string
	proto, ids := "", 0
	// A copy that TEE sends is like its original, but for where it comes from. A
	// bridged packet has no IN at POSTROUTING, but both ports; the copy of one that
	// came through a port has that alone.
	if slices.Contains(fields, "IN=") && !strings.Contains(l.Text, " PHYSOUT=") {
		flow, packet = append(flow, "local"), append(packet, "local")
	}
	for _, f := range fields[1:] {
		// What an ICMP error quotes of another packet is not this packet's.
		if strings.HasPrefix(f, "[") {
			break
		}
		key, _, _ := strings.Cut(f, "=")
		switch key {
		case "PROTO":
			proto = f
			flow, packet = append(flow, f), append(packet, f)
		case "SRC", "DST", "SPT", "DPT":
			flow = append(flow, f)
		case "ID":
			// ICMP has an ID of its own, which NAT may change.
			if ids++; ids == 1 && proto == "" {
				packet = append(packet, f)
			}
			flow = append(flow, f)
		case "LEN", "SEQ", "ACK", "TYPE", "CODE", "FLOWLBL", "SYN", "FIN", "RST", "PSH":
			flow, packet = append(flow, f), append(packet, f)
		default:
			// Fragments: IPv4 prints FRAG:offset, IPv6 FRAG:offset and ID:number.
			if strings.HasPrefix(f, "FRAG:") || strings.HasPrefix(f, "ID:") {
				flow, packet = append(flow, f), append(packet, f)
			}
		}
	}
	l.Flow, l.Packet = strings.Join(flow, " "), strings.Join(packet, " ")
	return l, nil
}

// Compare holds the lines of a tool against the kernel's. Every line of one must
// be in the other, as often, with the same text but for blanks at the end; and
// the lines of one packet must be in the kernel's order. Lines of different
// packets may be mixed in any way.
//
// Packets that are alike in every field that a TRACE line has cannot be told
// apart: of these the order of the first occurrences is compared. Traffic for
// tests should differ in IP ID, length or sequence.
func Compare(kernel, tool []string) error {
	k, err := parseAll("the kernel", kernel)
	if err != nil {
		return err
	}
	t, err := parseAll("the tool", tool)
	if err != nil {
		return err
	}

	var report []string
	count := map[string]int{}
	for _, l := range k {
		count[l.Text]++
	}
	for _, l := range t {
		count[l.Text]--
	}
	for _, l := range k {
		if n := count[l.Text]; n > 0 {
			report = append(report, fmt.Sprintf("missing from the tool (%d×): %s", n, l.Text))
			count[l.Text] = 0
		}
	}
	for _, l := range t {
		if n := count[l.Text]; n < 0 {
			report = append(report, fmt.Sprintf("not from the kernel (%d×): %s", -n, l.Text))
			count[l.Text] = 0
		}
	}
	if len(report) > 0 {
		return mismatch(report, len(k), len(t))
	}

	// The same lines on both sides: now their order, packet by packet.
	for _, key := range []func(Line) string{
		func(l Line) string { return l.Packet },
		func(l Line) string { return l.Flow },
	} {
		kg, order := group(k, key)
		tg, _ := group(t, key)
		for _, name := range order {
			a, b := kg[name], tg[name]
			if copied(a) || mixed(a, b) {
				continue
			}
			if repeats(a) {
				// More than one packet, or a chain that was entered twice.
				a, b = firsts(a), firsts(b)
				// Across flows even that means nothing.
				if key(a[0]) == a[0].Packet && manyFlows(a) {
					continue
				}
			}
			for i := range a {
				if a[i].Text != b[i].Text {
					report = append(report, fmt.Sprintf("order differs in packet %s:\n  kernel %s\n  tool   %s", name, rules(a), rules(b)))
					break
				}
			}
		}
		if len(report) > 0 {
			return mismatch(report, len(k), len(t))
		}
	}
	return nil
}

// SameOwners returns the tool's lines, of which those that differ from a missing one of the
// kernel's in nothing but the receiver (UID and GID of a packet at PREROUTING or INPUT)
// are replaced by the kernel's, and the number of packets they are of. A packet has as
// many such lines as it runs through rules meanwhile.
//
// Early demultiplexing gives a received packet its socket. A task on another CPU that
// accepts the connection, or closes it, between the tool's look at the packet and the
// kernel's gives or takes the owner; both are right. On one CPU this cannot be.
func SameOwners(kernel, tool []string) ([]string, int) {
	missing := map[string][]string{} // by the text without the owner
	for _, s := range kernel {
		if text, ok := withoutReceiver(s); ok {
			missing[text] = append(missing[text], s)
		}
	}
	trim := func(s string) string { return strings.TrimRight(s, " \t\r\n") }
	same := slices.Clone(tool)
	var differ []int
	for i, s := range tool {
		text, ok := withoutReceiver(s)
		if !ok {
			continue
		}
		k := slices.IndexFunc(missing[text], func(line string) bool { return trim(line) == trim(s) })
		if k < 0 {
			differ = append(differ, i)
			continue
		}
		missing[text] = slices.Delete(missing[text], k, k+1)
	}
	packets := map[string]bool{}
	for _, i := range differ {
		text, _ := withoutReceiver(tool[i])
		if left := missing[text]; len(left) > 0 {
			same[i], missing[text] = left[0], left[1:]
			l, _ := ParseLine(text) // withoutReceiver could
			packets[l.Packet] = true
		}
	}
	return same, len(packets)
}

var owner = regexp.MustCompile(` UID=\d+ GID=\d+`)

// withoutReceiver cuts the owner out of a line of a received packet; a mark may follow it.
func withoutReceiver(s string) (text string, ok bool) {
	l, err := ParseLine(s)
	if err != nil {
		return "", false
	}
	fields := strings.SplitN(l.Rule, ":", 3)
	received := len(fields) == 3 && !strings.Contains(l.Text, " IN= ") &&
		(fields[1] == "PREROUTING" || fields[1] == "INPUT" || strings.Contains(l.Text, " OUT= "))
	return owner.ReplaceAllString(l.Text, ""), received
}

func parseAll(who string, lines []string) ([]Line, error) {
	var out []Line
	for _, s := range lines {
		l, err := ParseLine(s)
		if err != nil {
			return nil, fmt.Errorf("from %s: %w", who, err)
		}
		out = append(out, l)
	}
	return out, nil
}

const maxReport = 40

func mismatch(report []string, kernel, tool int) error {
	n := len(report)
	if n > maxReport {
		report = append(report[:maxReport], fmt.Sprintf("and %d more", n-maxReport))
	}
	return fmt.Errorf("the tool's trace is not the kernel's (%d lines from the kernel, %d from the tool):\n%s",
		kernel, tool, strings.Join(report, "\n"))
}

func group(lines []Line, key func(Line) string) (map[string][]Line, []string) {
	groups := map[string][]Line{}
	var order []string
	for _, l := range lines {
		n := key(l)
		if groups[n] == nil {
			order = append(order, n)
		}
		groups[n] = append(groups[n], l)
	}
	return groups, order
}

func repeats(lines []Line) bool {
	seen := map[string]bool{}
	for _, l := range lines {
		if seen[l.Rule] {
			return true
		}
		seen[l.Rule] = true
	}
	return false
}

// mixed reports that the kernel's lines are of two packets that look alike, one of which
// began within the path of the other (TEE's copy of a local packet): the tool prints one
// after the other, each from the same first rule on and in its own order.
func mixed(kernel, tool []Line) bool {
	for i := 1; i < len(tool); i++ {
		if tool[i].Rule == tool[0].Rule && isShuffle(kernel, tool[:i], tool[i:]) {
			return true
		}
	}
	return false
}

// isShuffle reports that lines are those of a and of b, each in its order.
func isShuffle(lines, a, b []Line) bool {
	if len(lines) != len(a)+len(b) {
		return false
	}
	// ok[j]: the first i lines of a and the first j of b make the first i+j lines.
	ok := make([]bool, len(b)+1)
	for i := 0; i <= len(a); i++ {
		for j := 0; j <= len(b); j++ {
			ok[j] = i == 0 && j == 0 ||
				i > 0 && ok[j] && lines[i+j-1].Text == a[i-1].Text ||
				j > 0 && ok[j-1] && lines[i+j-1].Text == b[j-1].Text
		}
	}
	return ok[len(b)]
}

// copied reports that the lines are of a packet and the copy that TEE made of it:
// one packet leaves once, and is not here any more then. A tool may print one after the other.
func copied(lines []Line) bool {
	left := map[string]bool{}
	came := false
	for _, l := range lines {
		switch hook(l.Rule) {
		case "PREROUTING", "INPUT", "FORWARD":
			if came && len(left) > 0 {
				return true // it is here, and has left before
			}
			came = true
		case "POSTROUTING":
			if !strings.Contains(l.Rule, ":policy:") {
				continue
			}
			if left[l.Rule] {
				return true
			}
			left[l.Rule] = true
		}
	}
	return false
}

func manyFlows(lines []Line) bool {
	for _, l := range lines {
		if l.Flow != lines[0].Flow {
			return true
		}
	}
	return false
}

func firsts(lines []Line) []Line {
	seen := map[string]bool{}
	var out []Line
	for _, l := range lines {
		if !seen[l.Text] {
			seen[l.Text] = true
			out = append(out, l)
		}
	}
	return out
}

func rules(lines []Line) string {
	var s []string
	for _, l := range lines {
		s = append(s, l.Rule)
	}
	return strings.Join(s, " ")
}

// A Packet is the path that one packet took.
type Packet struct {
	First string   // the packet's first line: what it looked like on arrival
	Rules []string // table:chain:type:number, in the kernel's order
}

// Packets puts lines together to packets, in the order of their first lines.
// A line belongs to the newest packet that looks like it; a line of the first
// table at the first hook (raw at PREROUTING or OUTPUT) begins a new one, and so
// does one that looks like no packet before it.
func Packets(lines []string) ([]Packet, error) {
	all, err := parseAll("the kernel", lines)
	if err != nil {
		return nil, err
	}
	var packets []Packet
	newest := map[string]int{} // Line.Packet → index
	for i, l := range all {
		at, known := newest[l.Packet]
		begins := strings.HasPrefix(l.Rule, "raw:PREROUTING:") || strings.HasPrefix(l.Rule, "raw:OUTPUT:")
		// Raw's chains may have several lines: only the first of a run begins.
		if begins && known && len(packets[at].Rules) > 0 && rawOnly(packets[at].Rules) && hook(l.Rule) == hook(packets[at].Rules[0]) &&
			i > 0 && all[i-1].Flow == l.Flow && all[i-1].Rule != l.Rule {
			begins = false
		}
		if !known || begins {
			newest[l.Packet] = len(packets)
			packets = append(packets, Packet{First: l.Text, Rules: []string{l.Rule}})
			continue
		}
		packets[at].Rules = append(packets[at].Rules, l.Rule)
	}
	return packets, nil
}

func rawOnly(rules []string) bool {
	for _, r := range rules {
		if !strings.HasPrefix(r, "raw:") {
			return false
		}
	}
	return true
}

func hook(rule string) string {
	parts := strings.Split(rule, ":")
	return parts[1]
}
