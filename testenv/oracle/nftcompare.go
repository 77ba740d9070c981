package oracle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// An NFTJourney is what nftrace says of one packet: its runs of base chains, in its order.
type NFTJourney struct {
	ID       uint64
	What     string // of one with a hole: which packet it is, and the steps that nftrace has of it
	HalfSeen string
	Lost     uint64
	Runs     []NFTRun
}

// whole reports that nftrace has all of the packet's way.
func (j *NFTJourney) whole() bool { return j.HalfSeen == "" && j.Lost == 0 }

// nftObject is what the comparison needs of an object of nftrace --format json
// (pkg/render/json.go).
type nftObject struct {
	ID       uint64 `json:"id"`
	HalfSeen string `json:"half_seen"`
	Lost     uint64 `json:"lost"`
	Packet   struct{ Summary string }
	Steps    []struct {
		Kind       string `json:"kind"`
		NetnsName  string `json:"netns_name"`
		Family     string `json:"family"`
		Hook       string `json:"hook"`
		Verdict    string `json:"verdict"`
		Reinjected bool   `json:"reinjected"`
		In, Out    struct{ Index int }
		Table      struct {
			Name       string `json:"name"`
			Engine     string `json:"engine"`
			Family     string `json:"family"`
			BaseChain  string `json:"base_chain"`
			Compat     bool   `json:"compat"`
			Unresolved string `json:"unresolved"`
			Before     nftJSONPacket
			After      *nftJSONPacket
			Rules      []struct {
				Trace    string `json:"trace"`
				Chain    string `json:"chain"`
				Type     string `json:"type"`
				Number   int    `json:"number"`
				Handle   uint64 `json:"handle"`
				IsPolicy bool   `json:"is_policy"`
				IsEnd    bool   `json:"is_end"`
				Action   string `json:"action"`
				Depth    int    `json:"depth"`
				Packet   *nftJSONPacket
			}
		}
	}
}

func (o *nftObject) what() string {
	w := []string{o.Packet.Summary}
	for i := range o.Steps {
		w = append(w, strings.TrimSpace(o.Steps[i].Kind+" "+o.Steps[i].Hook))
	}
	return strings.Join(w, ", ")
}

type nftJSONPacket struct {
	Family   string   `json:"family"`
	Length   int      `json:"length"`
	Src      string   `json:"src"`
	Dst      string   `json:"dst"`
	Proto    *int     `json:"proto"`
	SrcPort  *int     `json:"sport"`
	DstPort  *int     `json:"dport"`
	TCPFlags []string `json:"tcp_flags"`
	ICMPType *int     `json:"icmp_type"`
	ICMPCode *int     `json:"icmp_code"`
	FragOff  *int     `json:"frag_off"`
}

func (p *nftJSONPacket) packet() NFTPacket {
	or := func(v *int, none int) int {
		if v == nil {
			return none
		}
		return *v
	}
	h := nftHead{
		family: p.Family, src: p.Src, dst: p.Dst, length: p.Length, proto: or(p.Proto, -1),
		fragment: p.FragOff != nil, fragOff: or(p.FragOff, 0),
		ports: p.SrcPort != nil, sport: or(p.SrcPort, 0), dport: or(p.DstPort, 0),
		icmp: p.ICMPType != nil, icmpType: or(p.ICMPType, 0), icmpCode: or(p.ICMPCode, 0),
	}
	if h.family == "ip6" && h.icmp && h.icmpType == 143 {
		return NFTPacket{Key: nftReport}
	}
	var flags []string
	for _, name := range tcpFlagNames {
		if slices.Contains(p.TCPFlags, name) {
			flags = append(flags, name)
		}
	}
	h.flags = strings.Join(flags, ",")
	return NFTPacket{Key: h.key()}
}

// ParseNFT reads nftrace's JSON: what it says of nf_tables in one namespace. Packets
// that met none there are left out, and those that did not meet the oracle's own table: of
// them the kernel tells nothing, since they came before that was loaded. A piece of a packet that
// was cut up in a queue begins behind that table.
func ParseNFT(r io.Reader, ns string) ([]NFTJourney, error) {
	var out []NFTJourney
	for d := json.NewDecoder(r); ; {
		var o nftObject
		switch err := d.Decode(&o); {
		case errors.Is(err, io.EOF):
			return out, nil
		case err != nil:
			return nil, fmt.Errorf("nftrace's JSON: %w", err)
		}
		j := NFTJourney{ID: o.ID, HalfSeen: o.HalfSeen, Lost: o.Lost}
		if !j.whole() {
			j.What = o.what()
		}
		marked := false
		for i := range o.Steps {
			s := &o.Steps[i]
			t := &s.Table
			if s.Kind != "table" || t.Engine != "nf_tables" || s.NetnsName != ns {
				continue
			}
			if t.Name == NFTTable {
				marked = true
				continue
			}
			marked = marked || s.Reinjected && len(j.Runs) == 0
			run := NFTRun{
				Family: t.Family, Table: t.Name, Chain: t.BaseChain, Compat: t.Compat,
				PF: s.Family, Hook: s.Hook, In: s.In.Index, Out: s.Out.Index,
				Verdict: s.Verdict, Packet: t.Before.packet(), Unresolved: t.Unresolved,
			}
			// The kernel tells of the packet with its first event, which is behind the first
			// rule; of nftrace's, packet is null where the rule met the one before.
			switch n := len(t.Rules); {
			case n > 1 && t.Rules[1].Packet != nil:
				run.Packet = t.Rules[1].Packet.packet()
			case n == 1 && t.After != nil:
				run.Packet = t.After.packet()
			}
			for _, r := range t.Rules {
				run.Rules = append(run.Rules, NFTRule{
					Trace: r.Trace, Chain: r.Chain, Type: r.Type, Number: r.Number, Handle: r.Handle,
					IsPolicy: r.IsPolicy, IsEnd: r.IsEnd, Action: kernelAction(r.Action, r.IsPolicy), Depth: r.Depth,
				})
			}
			j.Runs = append(j.Runs, run)
		}
		if marked && len(j.Runs) > 0 || !j.whole() {
			out = append(out, j)
		}
	}
}

// kernelAction is what the kernel's trace says where nftrace knows more: reject ends in
// a drop, NAT and TPROXY in an accept. Nothing else is the same.
func kernelAction(action string, policy bool) string {
	if !policy {
		switch action {
		case "REJECT", "reject":
			return "DROP"
		case "DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP", "TPROXY", "dnat", "snat", "masquerade", "redirect":
			return "ACCEPT"
		}
	}
	return action
}

// where says which base chain a run is of, of what packet.
func (r *NFTRun) where() string {
	return fmt.Sprintf("%s: %s %s %s at %s %s, in %d, out %d", r.Packet.Key, r.Family, r.Table, r.Chain, r.PF, r.Hook, r.In, r.Out)
}

// what says what happened in it.
func (r *NFTRun) what() string {
	var b strings.Builder
	for _, l := range r.Rules {
		fmt.Fprintf(&b, "\n    %s (%s %s %d) handle %d depth %d", l.Trace, l.Chain, l.Type, l.Number, l.Handle, l.Depth)
		if l.IsPolicy {
			b.WriteString(" policy")
		}
		if l.IsEnd {
			b.WriteString(" end")
		}
		b.WriteString(" → " + l.Action)
	}
	fmt.Fprintf(&b, "\n    verdict %s", r.Verdict)
	if r.Compat {
		b.WriteString(", compat")
	}
	return b.String()
}

// CompareNFT holds nftrace's journeys against the kernel's runs, which are in the kernel's
// order. Every run of one must be in the other, as often, and alike in all of its lines;
// and the runs of one journey must be one packet's, in the kernel's order.
//
// Packets that the JSON cannot tell apart are taken in the order in which they come.
//
// Where a cause is given, runs may be unresolved for that cause, and some must be: of
// these only the place and the packet are compared.
func CompareNFT(kernel []NFTRun, tool []NFTJourney, cause string) error {
	var report []string
	say := func(format string, args ...any) { report = append(report, fmt.Sprintf(format, args...)) }

	// The kernel's runs by place and what happened, in its order.
	waiting := map[string][]int{}
	for i := range kernel {
		if r := &kernel[i]; r.Packet.Key != nftReport {
			waiting[r.where()+r.what()] = append(waiting[r.where()+r.what()], i)
		}
	}
	matched := map[int]bool{}
	// take picks one of the kernel's runs, if possible behind the last one, and of that packet,
	// but none of those taken.
	take := func(candidates, taken []int, last int, identity string) int {
		best := -1
		for _, i := range candidates {
			if matched[i] || slices.Contains(taken, i) {
				continue
			}
			id := kernel[i].Packet.Identity
			if i > last && (identity == "" || id == "" || id == identity) {
				best = i
				break
			}
			if best < 0 {
				best = i
			}
		}
		return best
	}
	// follow picks runs for a journey from a candidate for its first resolved one on, and tells
	// whether they are one packet's, in the kernel's order. Packets may look alike at one hook and
	// meet other rules at the next.
	follow := func(t *NFTJourney, first int) (runs []int, ok bool) {
		last, identity := -1, ""
		ok = true
		for n := range t.Runs {
			r := &t.Runs[n]
			i := -1
			switch {
			case r.Packet.Key == nftReport || r.Unresolved != "":
			case last < 0 && first >= 0:
				i = first
			default:
				i = take(waiting[r.where()+r.what()], runs, last, identity)
				id := ""
				if i >= 0 {
					id = kernel[i].Packet.Identity
				}
				ok = ok && i > last && (identity == "" || id == "" || id == identity)
			}
			runs = append(runs, i)
			if i >= 0 {
				if last = i; kernel[i].Packet.Identity != "" {
					identity = kernel[i].Packet.Identity
				}
			}
		}
		return runs, ok
	}

	// candidates are the kernel's runs that may be the first resolved one of a journey.
	candidates := func(t *NFTJourney) []int {
		for n := range t.Runs {
			if r := &t.Runs[n]; r.Packet.Key != nftReport && r.Unresolved == "" {
				return slices.DeleteFunc(slices.Clone(waiting[r.where()+r.what()]), func(i int) bool { return matched[i] })
			}
		}
		return nil
	}

	type place struct{ journey, run int }
	at := map[place]int{}
	nruns, unresolved := 0, 0
	var left []place
	for j := range tool {
		t := &tool[j]
		if !t.whole() {
			say("packet %d (%s): half seen: %q, lost: %d", t.ID, t.What, t.HalfSeen, t.Lost)
		}
		runs, _ := follow(t, -1)
		// From the last one on: of packets that have one identity in turn, what is between a
		// run and the next is of the same packet.
		for _, i := range slices.Backward(candidates(t)) {
			if others, fits := follow(t, i); fits {
				runs = others
				break
			}
		}
		for n, i := range runs {
			switch r := &t.Runs[n]; {
			case r.Packet.Key == nftReport:
				continue
			case i < 0:
				left = append(left, place{j, n})
			default:
				at[place{j, n}] = i
				matched[i] = true
			}
			nruns++
		}
	}

	// What is left differs, or is unresolved.
	rest := map[string][]int{}
	for i := range kernel {
		if r := &kernel[i]; r.Packet.Key != nftReport && !matched[i] {
			rest[r.where()] = append(rest[r.where()], i)
		}
	}
	for _, p := range left {
		r := &tool[p.journey].Runs[p.run]
		i := take(rest[r.where()], nil, -1, "")
		if i >= 0 {
			at[p] = i
			matched[i] = true
		}
		switch {
		case r.Unresolved != "" && (cause == "" || !strings.Contains(r.Unresolved, cause)):
			say("unresolved: %s: %s", r.where(), r.Unresolved)
		case i < 0:
			say("not from the kernel: packet %d: %s%s", tool[p.journey].ID, r.where(), r.what())
		case r.Unresolved != "":
			unresolved++
		default:
			say("differs: packet %d: %s\n  kernel%s\n  tool%s", tool[p.journey].ID, r.where(), kernel[i].what(), r.what())
		}
	}
	for i := range kernel {
		if r := &kernel[i]; r.Packet.Key != nftReport && !matched[i] {
			say("missing from the tool: %s%s", r.where(), r.what())
		}
	}
	if cause != "" && unresolved == 0 {
		say("no run was unresolved for %q: take the section away", cause)
	}

	// The runs of one journey.
	for j := range tool {
		last, identity := -1, ""
		for n := range tool[j].Runs {
			i, ok := at[place{j, n}]
			if !ok {
				continue
			}
			if i < last {
				say("order differs in packet %d: the kernel had\n  %s\nbefore\n  %s", tool[j].ID, kernel[i].where(), kernel[last].where())
				break
			}
			last = i
			id := kernel[i].Packet.Identity
			if id != "" && identity != "" && id != identity {
				say("packet %d is more than one: %s and %s, at %s", tool[j].ID, identity, id, kernel[i].where())
				break
			}
			if id != "" {
				identity = id
			}
		}
	}
	if len(report) > 0 {
		n := len(report)
		if n > maxReport {
			report = append(report[:maxReport], fmt.Sprintf("and %d more", n-maxReport))
		}
		return fmt.Errorf("nftrace is not the kernel (%d runs of base chains from the kernel, %d from nftrace):\n%s",
			len(kernel), nruns, strings.Join(report, "\n"))
	}
	return nil
}

// NFTHits counts how often each line of the runs was met, as "inet filter forward 3"; in
// place of the number, "policy" and "end" are the policy and the end of a chain.
func NFTHits(runs []NFTRun) map[string]int {
	hits := map[string]int{}
	for i := range runs {
		for _, l := range runs[i].Rules {
			number := fmt.Sprint(l.Number)
			switch {
			case l.IsPolicy:
				number = "policy"
			case l.IsEnd:
				number = "end"
			}
			hits[strings.Join([]string{runs[i].Family, runs[i].Table, l.Chain, number}, " ")]++
		}
	}
	return hits
}

// FormatNFT prints runs for people.
func FormatNFT(runs []NFTRun) string {
	var b strings.Builder
	for i := range runs {
		fmt.Fprintf(&b, "%s  [%s]%s\n", runs[i].where(), runs[i].Packet.Identity, runs[i].what())
	}
	return b.String()
}
