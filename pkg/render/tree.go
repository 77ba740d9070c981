package render

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/nftrace/nftrace/pkg/events"
)

// TreeOptions say how [Tree] writes. The zero value writes plain text.
type TreeOptions struct {
	// Color marks verdicts, headings and rewrites with ANSI colours. The caller
	// decides by whether it writes to a terminal and by NO_COLOR.
	Color bool
}

// Tree writes j for people: one heading for the packet, below it the hooks it
// passed in the kernel's order, at each the rules that matched, with their own
// text and what they did, and a last line that says what became of the packet.
func Tree(w io.Writer, j *events.Journey, opts TreeOptions) error {
	return writeOnce(w, appendTree(nil, j, opts))
}

// NewTree returns a Renderer that prints what [Tree] does, an empty line between packets.
func NewTree(opts TreeOptions) Renderer {
	first := true
	return renderer(func(b []byte, j *events.Journey) []byte {
		if !first {
			b = append(b, '\n')
		}
		first = false
		return appendTree(b, j, opts)
	})
}

// style is what a piece of text is, for colour.
type style uint8

const (
	plain style = iota
	heading
	hookLine
	good
	bad
	dim
	rewrite
	warning
)

var sgr = [...]string{plain: "", heading: "1", hookLine: "36", good: "32", bad: "1;31", dim: "2", rewrite: "33", warning: "1;33"}

// A line of the tree: one text, or the three columns of a rule.
type line struct {
	indent int
	text   string
	style  style

	isRule           bool
	rule, does, then string // label, the rule's text, what it did
	doesStyle        style
}

// Columns wider than these don't push the others away.
const (
	maxRuleWidth = 56
	maxDoesWidth = 72
)

func appendTree(b []byte, j *events.Journey, opts TreeOptions) []byte {
	t := tree{j: j}
	t.build()

	ruleWidth, doesWidth := 0, 0
	for i := range t.lines {
		if l := &t.lines[i]; l.isRule {
			ruleWidth = max(ruleWidth, min(width(l.rule)+l.indent, maxRuleWidth))
			doesWidth = max(doesWidth, min(width(l.does), maxDoesWidth))
		}
	}
	paint := func(s style, text string) {
		if !opts.Color || sgr[s] == "" || text == "" {
			b = append(b, text...)
			return
		}
		b = append(b, "\x1b["...)
		b = append(b, sgr[s]...)
		b = append(b, 'm')
		b = append(b, text...)
		b = append(b, "\x1b[0m"...)
	}
	pad := func(n int) {
		for ; n > 0; n-- {
			b = append(b, ' ')
		}
	}
	for i := range t.lines {
		l := &t.lines[i]
		pad(l.indent)
		if !l.isRule {
			paint(l.style, l.text)
			b = append(b, '\n')
			continue
		}
		paint(plain, l.rule)
		pad(ruleWidth - l.indent - width(l.rule))
		if doesWidth > 0 {
			pad(2)
			paint(l.doesStyle, l.does)
			pad(doesWidth - width(l.does))
		}
		pad(2)
		b = append(b, "→ "...)
		paint(l.style, l.then)
		b = append(b, '\n')
	}
	return b
}

func width(s string) int { return utf8.RuneCountInString(s) }

// place is a hook in a namespace, with its devices.
type place struct {
	netns                    uint32
	netnsName                string
	pf, hook                 uint8
	in, out, physIn, physOut events.Device
	reinjected               bool
}

func placeOf(s *events.Step) place {
	return place{s.Netns, s.NetnsName, s.PF, s.Hook, s.In, s.Out, s.PhysIn, s.PhysOut, s.Reinjected}
}

// samePlace tells whether two steps were at one hook. What the bridge knew of the packet
// is gone with it when the hook that dropped it returns, so ports may be missing.
func samePlace(a, b place) bool {
	if a.physIn.Index == 0 || b.physIn.Index == 0 {
		a.physIn, b.physIn = events.Device{}, events.Device{}
	}
	if a.physOut.Index == 0 || b.physOut.Index == 0 {
		a.physOut, b.physOut = events.Device{}, events.Device{}
	}
	return a == b
}

type tree struct {
	j     *events.Journey
	lines []line

	open     bool  // a hook's heading stands
	at       place // it
	hasTable bool  // it had a table
	hasNAT   bool  // it had table nat

	engines bool // tables are told with their engine

	netns     uint32
	netnsName string
	visit     visit
	tunnels   []int // see tunnelled

	// The packet as it was told of last.
	ttl  int
	mark uint32
	head head
	// rewritten is what was told of its addresses and ports since.
	rewritten *events.Tuple
}

// visit is what is known of a packet's stay in one namespace, as what it is there: in a tunnel it
// is another packet to conntrack.
type visit struct {
	ct       string // the last conntrack state other than none
	reply    bool
	natTable bool
	// Of the tables, legacy is set if any is xtables', and nftNAT if nf_tables has chains of
	// type nat.
	legacy, nftNAT bool
	natStep        bool
	// entry is the packet's tuple before NAT, by which its conntrack
	// entry is known; empty where it is not certain.
	entry string
	said  bool
}

func (t *tree) add(indent int, s style, text string) {
	t.lines = append(t.lines, line{indent: indent, style: s, text: text})
}

func (t *tree) build() {
	j := t.j
	t.engines = bothEngines(j)
	t.tunnels = tunnelled(j)
	t.heading()
	if j.HalfSeen != "" {
		t.add(2, warning, "! half seen: "+escape(j.HalfSeen))
	}
	if len(j.Steps) > 0 {
		// Nothing is said of the namespace that nftrace runs in.
		t.netns = j.Steps[0].Netns
		t.visit = t.newVisit(0)
		if j.Steps[0].NetnsName != "" {
			t.sayNetns(j.Steps[0].NetnsName)
		}
	}
	for i := range j.Steps {
		s := &j.Steps[i]
		if s.Netns != t.netns || s.NetnsName != t.netnsName {
			t.close()
			t.netns = s.Netns
			t.visit = t.newVisit(i)
			t.sayNetns(s.NetnsName)
		}
		if slices.Contains(t.tunnels, i) {
			t.tunnel(i)
		}
		switch s.Kind {
		case events.StepTable:
			if s.Table != nil {
				t.table(s)
			}
		case events.StepHook:
			t.hook(i)
		case events.StepNAT:
			if s.NAT != nil {
				t.nat(i)
			}
		case events.StepFlowtable:
			if s.Flowtable != nil {
				t.flowtable(s)
			}
		case events.StepBridge:
			t.close()
			t.add(2, hookLine, "bridge  to port "+device(s.Out))
		case events.StepXmit:
			t.close()
			if !(i == len(j.Steps)-1 && j.Outcome.Kind == events.OutSent && j.Outcome.Device == s.Out) {
				t.add(2, hookLine, "transmit  out of "+device(s.Out))
			}
		case events.StepDeliver:
			t.close()
			if !(i == len(j.Steps)-1 && j.Outcome.Kind == events.OutDelivered) {
				t.add(2, hookLine, "deliver  to the local protocol")
			}
		}
	}
	t.close()
	switch {
	case j.Lost == 1:
		t.add(2, warning, "! 1 record of this packet was lost: the path above has a hole")
	case j.Lost > 1:
		t.add(2, warning, fmt.Sprintf("! %d records of this packet were lost: the path above has a hole", j.Lost))
	}
	t.outcome()
}

func (t *tree) heading() {
	p := &t.j.First
	h := parseHead(p)
	t.ttl, t.mark, t.head = h.ttl, p.Mark, h

	var b strings.Builder
	b.WriteString(Describe(p))
	if p.Len > 0 {
		fmt.Fprintf(&b, ", %d bytes", p.Len)
	}
	if h.ttl >= 0 {
		fmt.Fprintf(&b, ", %s %d", ttlName(p), h.ttl)
	}
	if p.Mark != 0 {
		fmt.Fprintf(&b, ", mark 0x%x", p.Mark)
	}
	if p.HasOwner {
		fmt.Fprintf(&b, ", uid %d", p.UID)
	}
	// Conntrack comes to know a packet only after its first sighting.
	ct, reply := p.CT, p.CTReply
	for i := 0; i < len(t.j.Steps) && ct == "" && !slices.Contains(t.tunnels, i); i++ {
		if s := &t.j.Steps[i]; s.Table != nil {
			for _, q := range packetsOf(s.Table) {
				if q.CT != "" {
					ct, reply = q.CT, q.CTReply
					break
				}
			}
		}
	}
	if ct != "" {
		b.WriteString(", " + escape(ct))
		if reply {
			b.WriteString(" (reply direction)")
		}
	}
	t.add(0, heading, b.String())
}

func ttlName(p *events.Packet) string {
	if p.Family == events.PFIPv6 {
		return "hop limit"
	}
	return "ttl"
}

// packetsOf are the packet's shapes during one run of a table.
func packetsOf(r *events.TableRun) []*events.Packet {
	ps := []*events.Packet{r.Before}
	for i := range r.Met {
		ps = append(ps, r.Met[i].Pkt)
	}
	ps = append(ps, r.After)
	return slices.DeleteFunc(ps, func(p *events.Packet) bool { return p == nil })
}

// newVisit looks at the steps from first on that are in the same namespace.
func (t *tree) newVisit(first int) visit {
	var v visit
	steps := t.j.Steps
	for i := first; i < len(steps) && steps[i].Netns == steps[first].Netns && (i == first || !slices.Contains(t.tunnels, i)); i++ {
		s := &steps[i]
		if s.Table != nil && (s.PF == events.PFIPv4 || s.PF == events.PFIPv6) {
			if isNAT(s.Table) {
				v.natTable = true
			}
			if n := s.Table.NFT; n != nil {
				v.nftNAT = v.nftNAT || n.NAT
			} else {
				v.legacy = true
			}
			for _, p := range packetsOf(s.Table) {
				if p.CT != "" {
					v.ct, v.reply = p.CT, p.CTReply
				}
			}
		}
		if s.NAT != nil && !v.natStep {
			v.natStep = true
			if t.j.HalfSeen == "" && t.j.Lost == 0 && v.ct != "RELATED" {
				n := s.NAT
				v.entry = protoName(int(n.Before.Proto)) + " " + endpoints(n.Before)
				if n.CTReply {
					v.entry += " (its reply direction)"
				}
			}
		}
	}
	return v
}

// layer is what a packet is to the protocol above Ethernet: what a tunnel or IPsec changes, and
// nothing else. It is the zero value where that is not known.
type layer struct {
	proto int
	addr  int // length of an address in bits; 0: ARP
	known bool
}

func layerOf(p *events.Packet) layer {
	h := parseHead(p)
	switch {
	case !h.ip:
		return layer{known: p.EtherType == 0x0806}
	case h.proto < 0 || h.fragOff > 0 && h.src.Is6():
		return layer{} // it is behind what was not captured, or in another fragment
	}
	return layer{h.proto, h.src.BitLen(), true}
}

// layerAt is that of the packet at a step, which is p, or t where only a rewrite tells.
func layerAt(s *events.Step) (l layer, p *events.Packet, t *events.Tuple) {
	switch {
	case s.Table != nil:
		for _, p := range packetsOf(s.Table) {
			if l := layerOf(p); l.known {
				return l, p, nil
			}
		}
	case s.Kind == events.StepNAT && s.NAT != nil:
		t := &s.NAT.Before
		v6 := t.Src.Addr().Is6()
		return layer{int(t.Proto), t.Src.Addr().BitLen(), t.Src.IsValid() && !(v6 && isIPv6Ext(t.Proto))}, nil, t
	}
	return layer{}, nil, nil
}

// tunnelled are the steps at which the packet is in a tunnel, and was not before, or the other
// way round.
func tunnelled(j *events.Journey) []int {
	var at []int
	last := layerOf(&j.First)
	for i := range j.Steps {
		l, _, _ := layerAt(&j.Steps[i])
		if l.known && l != last && last.known {
			at = append(at, i)
		}
		if l.known {
			last = l
		}
	}
	return at
}

// tunnel says what the packet is from step i on. Nothing is known of it then as of another one.
func (t *tree) tunnel(i int) {
	t.close()
	_, p, tuple := layerAt(&t.j.Steps[i])
	text := ""
	if p != nil {
		text, t.head = fmt.Sprintf("%s, %d bytes", Describe(p), p.Len), parseHead(p)
	} else {
		text, t.head = protoName(int(tuple.Proto))+" "+endpoints(*tuple), head{proto: -1, ttl: -1}
	}
	t.ttl, t.rewritten = t.head.ttl, nil
	t.add(2, hookLine, "now "+text)
	t.visit = t.newVisit(i)
}

func (t *tree) sayNetns(name string) {
	t.netnsName = name
	if name == "" {
		t.add(2, heading, "in nftrace's own namespace")
		return
	}
	t.add(2, heading, "in namespace "+escape(name))
}

// device names d for people.
func device(d events.Device) string {
	switch {
	case d.Name != "":
		return escape(d.Name)
	case d.Index != 0:
		return "interface " + strconv.Itoa(d.Index)
	}
	return "an unknown interface"
}

// hookTitle is the heading of a hook.
func hookTitle(p place) string {
	var b strings.Builder
	if p.pf != events.PFIPv4 && p.pf != events.PFIPv6 && p.pf != events.PFInet && p.pf != 0 {
		b.WriteString(familyName(p.pf) + " ")
	}
	b.WriteString(hookName(p.pf, p.hook))
	side := func(word string, d, phys events.Device) {
		if d.Index == 0 && phys.Index == 0 {
			return
		}
		b.WriteString("  " + word + " ")
		if d.Index == 0 {
			b.WriteString("port ")
			d, phys = phys, events.Device{}
		}
		b.WriteString(device(d))
		if phys.Index != 0 && phys.Index != d.Index {
			b.WriteString(" (port " + device(phys) + ")")
		}
	}
	side("in", p.in, p.physIn)
	side("out", p.out, p.physOut)
	if p.reinjected {
		b.WriteString("  back from the queue")
	}
	return b.String()
}

// enter makes p's heading stand.
func (t *tree) enter(p place, pkt *events.Packet) {
	if t.open && t.at == p {
		return
	}
	t.close()
	t.open, t.at, t.hasTable, t.hasNAT = true, p, false, false
	title := hookTitle(p)
	if pkt != nil && pkt.Data != nil {
		h := parseHead(pkt)
		if !t.sameEnds(&h) {
			// By IPVS, a rule of nf_tables, a tunnel of the same protocol, or by NAT of which no record is there.
			title += "  now " + h.ends()
		}
		if h.ttl >= 0 && h.ttl != t.ttl {
			if t.ttl >= 0 {
				title += fmt.Sprintf("  %s %d → %d", ttlName(pkt), t.ttl, h.ttl)
			}
			t.ttl = h.ttl
		}
		if f := h.fragment(); h.known() && t.head.known() && f != t.head.fragment() {
			if f == "" {
				f = "whole"
			}
			title += fmt.Sprintf("  now %s, %d bytes", f, pkt.Len)
		}
		if h.known() {
			t.head, t.rewritten = h, nil
		}
		if pkt.Mark != t.mark {
			title += fmt.Sprintf("  mark 0x%x → 0x%x", t.mark, pkt.Mark)
			t.mark = pkt.Mark
		}
	}
	t.add(2, hookLine, title)
}

// sameEnds tells whether a packet has the addresses and ports that were told of, as far as both are known.
func (t *tree) sameEnds(h *head) bool {
	if !h.known() || !t.head.known() {
		return true
	}
	src, dst := t.head.src, t.head.dst
	srcPort, dstPort, known := t.head.ports()
	if r := t.rewritten; r != nil {
		if !r.Src.IsValid() || !r.Dst.IsValid() {
			return true
		}
		src, dst = r.Src.Addr().WithZone(""), r.Dst.Addr().WithZone("")
		srcPort, dstPort = r.Src.Port(), r.Dst.Port()
		known = known && srcPort|dstPort != 0
	}
	s, d, ok := h.ports()
	return h.src == src && h.dst == dst && (!known || !ok || s == srcPort && d == dstPort)
}

// close ends the hook whose heading stands.
func (t *tree) close() {
	if t.open {
		t.sayNoNAT()
	}
	t.open = false
}

// sayNoNAT says, once for each namespace, why nat was not asked where that is certain: the hook
// has tables but nat was not among them, or nf_tables has chains for NAT which the packet did not
// meet, and the connection is one whose first packet went before.
func (t *tree) sayNoNAT() {
	if t.visit.said || t.visit.natTable || t.j.Lost > 0 || !t.hasTable || t.at.pf != events.PFIPv4 && t.at.pf != events.PFIPv6 {
		return
	}
	switch t.at.hook {
	case events.HookPreRouting, events.HookLocalOut, events.HookPostRouting:
		if !t.visit.legacy && !t.visit.nftNAT {
			return
		}
	default:
		// nf_tables may have no other chains where NAT is.
		if !t.visit.nftNAT {
			return
		}
	}
	h := parseHead(&t.j.First)
	switch {
	case t.visit.ct == "ESTABLISHED", t.visit.ct == "RELATED" && h.icmpError():
		t.add(4, dim, "nat not consulted: the connection's first packet settled it")
	case t.visit.ct == "UNTRACKED":
		t.add(4, dim, "nat not consulted: the packet is not tracked")
	default:
		return
	}
	t.visit.said = true
}

func (t *tree) table(s *events.Step) {
	r := s.Table
	t.enter(placeOf(s), r.Before)
	t.hasTable = true
	if isNAT(r) {
		t.hasNAT = true
	}
	for i := range r.Rules {
		_, unsure := r.Packet(i)
		t.rule(s, &r.Rules[i], unsure)
		// The rule that set the mark: the next one saw another.
		if i+1 < len(r.Rules) {
			if next, _ := r.Packet(i + 1); next != nil {
				t.setMark(6+2*depth(&r.Rules[i]), next.Mark)
			}
		}
	}
	if r.Hotdrop != "" {
		t.add(4, bad, tablePrefix(s)+escape(r.Name)+": "+escape(r.Hotdrop))
	}
	if r.Unresolved != "" {
		text := fmt.Sprintf("%s%s: rules unresolved: %s", tablePrefix(s), escape(r.Name), escape(r.Unresolved))
		switch {
		case r.EBT != nil && r.EBT.Hook == events.HookBrouting && r.EBT.Verdict == events.NFDrop:
			text += " (the table returned DROP: route it)" // which lets it go on
		case s.Verdict != events.VerdictUnknown:
			text += fmt.Sprintf(" (the table returned %s)", verdictName(s.Verdict))
		}
		t.add(4, warning, text)
	}
	if r.After != nil {
		t.setMark(4, r.After.Mark)
		if s.PF == events.PFBridge {
			t.sayMAC(r.Before, r.After)
		}
	}
}

// sayMAC says which Ethernet addresses a table has changed.
func (t *tree) sayMAC(before, after *events.Packet) {
	if before == nil || before.MACDevType != arphrdEther || len(before.MAC) < 12 || len(after.MAC) < 12 {
		return
	}
	for i, word := range []string{"destination", "source"} {
		a, b := net.HardwareAddr(before.MAC[6*i:6*i+6]), net.HardwareAddr(after.MAC[6*i:6*i+6])
		if !bytes.Equal(a, b) {
			t.add(4, rewrite, fmt.Sprintf("%s MAC %v → %v", word, a, b))
		}
	}
}

// setMark says that the mark has changed, if it has.
func (t *tree) setMark(indent int, mark uint32) {
	if mark != t.mark {
		t.add(indent, rewrite, fmt.Sprintf("mark 0x%x → 0x%x", t.mark, mark))
		t.mark = mark
	}
}

func depth(r *events.Rule) int { return max(0, min(r.Depth, maxDepth)) }

// maxDepth bounds the indent; the kernel's jump stack can be deeper.
const maxDepth = 16

// rule adds a rule; unsure is why it cannot be told what packet it met.
func (t *tree) rule(s *events.Step, r *events.Rule, unsure string) {
	l := line{
		indent: 4 + 2*depth(r),
		isRule: true,
		rule:   escape(label(s, r)) + engine(s, t.engines),
		does:   escape(r.Text),
		then:   escape(r.Action),
	}
	switch {
	case r.IsPolicy:
		l.does, l.doesStyle = "policy", dim
	case r.IsEnd:
		l.does, l.doesStyle = "end of chain", dim
	case r.Type == events.TypePolicy:
		// ip_tables.c:get_chainname_rulenum looks at the rule, not at its place.
		note := fmt.Sprintf("(rule %d, TRACE calls it policy)", r.Num)
		if l.does != "" {
			note = " " + note
		}
		l.does += note
	}
	verdict, _, _ := strings.Cut(r.Action, " ")
	switch verdict {
	case "ACCEPT":
		l.style = good
	case "DROP", "REJECT":
		l.style = bad
	case "jump", "goto", "RETURN", "continue":
		l.style = dim
	case "SNAT", "DNAT", "MASQUERADE", "REDIRECT", "NETMAP":
		l.style = rewrite
	case "":
		l.then = "unknown"
	}
	if unsure != "" {
		l.then += " (packet unresolved: " + escape(unsure) + ")"
	}
	t.lines = append(t.lines, l)
}

func verdictName(v int) string {
	switch v {
	case events.NFDrop:
		return "DROP"
	case events.NFAccept:
		return "ACCEPT"
	case events.NFStolen:
		return "STOLEN"
	case events.NFQueue:
		return "QUEUE"
	case events.NFRepeat:
		return "REPEAT"
	case events.VerdictUnknown:
		return ""
	}
	return "verdict " + strconv.Itoa(v)
}

// sentOn is why the rules of a hook that Step.SentOn tells of are unresolved.
const sentOn = "the packet went out of a device from here, and nobody told why (a rule with fwd, a flowtable, …)"

// hook shows a hook's own verdict where the tables do not say as much.
// STOLEN and QUEUE are shown only where the path ends: br_netfilter
// steals every packet that it takes through the IP hooks and brings it back.
func (t *tree) hook(i int) {
	s := &t.j.Steps[i]
	if s.SentOn() {
		t.enter(placeOf(s), nil)
		t.add(4, warning, "rules unresolved: "+sentOn)
		return
	}
	if s.Verdict == events.NFAccept || s.Verdict == events.VerdictUnknown || s.Verdict != events.NFDrop && !t.lastVerdict(i) {
		return
	}
	at := placeOf(s)
	if !t.open || !samePlace(t.at, at) {
		t.enter(at, nil)
	}
	who := t.byOther()
	for k := i - 1; k >= 0; k-- {
		p := &t.j.Steps[k]
		if p.Kind == events.StepNAT {
			continue
		}
		if p.Kind == events.StepHook || !samePlace(placeOf(p), at) {
			break
		}
		if p.Kind == events.StepTable && p.Verdict == s.Verdict {
			return
		}
		if p.Kind == events.StepTable && p.Verdict == events.VerdictUnknown {
			who = "a table above, or conntrack, NAT, nf_tables or another module at this hook"
		}
	}
	style := warning
	if s.Verdict == events.NFDrop {
		style = bad
	}
	t.add(4, style, fmt.Sprintf("hook → %s  %s", verdictName(s.Verdict), who))
}

// byOther says who else decides at a hook.
func (t *tree) byOther() string {
	if t.hasTable {
		return "none of the tables above: conntrack, NAT, nf_tables or another module at this hook"
	}
	return "no table was seen here: conntrack, NAT, nf_tables or another module at this hook"
}

func (t *tree) lastVerdict(i int) bool {
	// br_netfilter's hooks return after all that they let happen, drops included.
	if step := t.j.Outcome.Step; step >= 0 {
		return step == i
	}
	for k := i + 1; k < len(t.j.Steps); k++ {
		switch t.j.Steps[k].Kind {
		case events.StepHook:
			if t.j.Steps[k].Verdict != events.NFAccept {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// natHookOf says whether NAT of this kind happens at hook (nf_nat.h: HOOK2MANIP).
func natHookOf(source bool, hook uint8) bool {
	if source {
		return hook == events.HookPostRouting || hook == events.HookLocalIn
	}
	return hook == events.HookPreRouting || hook == events.HookLocalOut
}

func isIP(pf uint8) bool { return pf == events.PFIPv4 || pf == events.PFIPv6 || pf == events.PFInet }

func (t *tree) nat(i int) {
	s := &t.j.Steps[i]
	n := s.NAT
	indent := 4
	if !t.open || !isIP(t.at.pf) || !natHookOf(n.Source, t.at.hook) {
		t.close()
		indent = 2
		// No table ran at this hook. Its verdict, still to come, tells its name.
		for k := i + 1; k < len(t.j.Steps) && t.j.Steps[k].Netns == s.Netns; k++ {
			q := &t.j.Steps[k]
			if q.Kind == events.StepNAT {
				continue
			}
			if (q.Kind == events.StepHook || q.Kind == events.StepTable) && isIP(q.PF) && natHookOf(n.Source, q.Hook) {
				t.enter(placeOf(q), nil)
				indent = 4
			}
			break
		}
	}
	if t.open {
		t.sayNoNAT()
	}

	t.rewritten = &n.After
	var b strings.Builder
	b.WriteString("NAT" + rewrites(n, n.Source, !n.Source))
	if !t.open || !t.hasNAT {
		if t.visit.entry != "" {
			b.WriteString("  by the conntrack entry of " + t.visit.entry)
		} else {
			b.WriteString("  by its conntrack entry")
		}
	}
	t.add(indent, rewrite, b.String())
}

// rewrites says what NAT changed, and the source or the destination in any case if it is to.
func rewrites(n *events.NAT, source, destination bool) string {
	var said []string
	if source || n.Before.Src != n.After.Src {
		said = append(said, fmt.Sprintf("  source %s → %s", endpoint(n.Before.Proto, n.Before.Src), endpoint(n.After.Proto, n.After.Src)))
	}
	if destination || n.Before.Dst != n.After.Dst {
		said = append(said, fmt.Sprintf("  destination %s → %s", endpoint(n.Before.Proto, n.Before.Dst), endpoint(n.After.Proto, n.After.Dst)))
	}
	return strings.Join(said, ",")
}

// flowtable says who sent the packet on, and what was left out.
func (t *tree) flowtable(s *events.Step) {
	t.enter(placeOf(s), nil)
	f := s.Flowtable
	t.add(4, warning, "flowtable "+escape(familyName(f.Family)+":"+f.Table+":"+f.Name)+"  sends it on, past routing and the rules of PREROUTING, FORWARD and POSTROUTING")
	if s.NAT != nil {
		t.rewritten = &s.NAT.After
		t.add(4, rewrite, "NAT"+rewrites(s.NAT, false, false)+"  by the flowtable")
	}
}

// endpoint is an address with what NAT takes for its port.
func endpoint(proto uint8, a netip.AddrPort) string {
	if !a.IsValid() {
		return "?"
	}
	addr := a.Addr().WithZone("")
	switch proto {
	case protoTCP, protoUDP, protoUDPLite, protoSCTP, protoDCCP:
		return netip.AddrPortFrom(addr, a.Port()).String()
	case protoICMP, protoICMPv6:
		return addr.String() + " id " + strconv.Itoa(int(a.Port()))
	}
	return addr.String()
}

func endpoints(t events.Tuple) string {
	return endpoint(t.Proto, t.Src) + " → " + endpoint(t.Proto, t.Dst)
}

// isNAT tells whether only the first packet of a connection comes to the table.
func isNAT(t *events.TableRun) bool {
	switch {
	case t.NFT != nil:
		return t.NFT.Type == "nat"
	case t.EBT != nil:
		return false
	}
	return t.Name == "nat"
}

// bothEngines tells whether a packet met tables of iptables-legacy and of iptables-nft, or of
// ebtables-legacy and ebtables-nft, whose names are alike.
func bothEngines(j *events.Journey) bool {
	const legacy, nft = 1, 2
	ip, bridge := 0, 0
	for i := range j.Steps {
		s := &j.Steps[i]
		engines := &ip
		if s.PF == events.PFBridge {
			engines = &bridge
		}
		switch t := s.Table; {
		case t == nil:
		case t.NFT == nil:
			*engines |= legacy
		case t.NFT.Compat:
			*engines |= nft
		}
	}
	return ip == legacy|nft || bridge == legacy|nft
}

// engine says whose table it is, if that is wanted.
func engine(s *events.Step, wanted bool) string {
	switch {
	case !wanted || s.Table.NFT != nil && !s.Table.NFT.Compat:
		return ""
	case s.Table.NFT != nil:
		return " (nft)"
	}
	return " (legacy)"
}

// decider gives the step and rule that decided, nil where there is none.
func decider(j *events.Journey) (s *events.Step, r *events.Rule) {
	o := &j.Outcome
	if o.Step < 0 || o.Step >= len(j.Steps) {
		return nil, nil
	}
	s = &j.Steps[o.Step]
	if s.Table != nil && o.Rule >= 0 && o.Rule < len(s.Table.Rules) {
		r = &s.Table.Rules[o.Rule]
	}
	return s, r
}

// by names what decided, "" where nothing is known.
func by(j *events.Journey) string {
	s, r := decider(j)
	switch {
	case s == nil:
		return ""
	case r != nil:
		what := escape(label(s, r)) + engine(s, bothEngines(j))
		switch {
		case r.IsPolicy:
			return "the policy of " + escape(tablePrefix(s)+s.Table.Name+":"+r.Chain) + " (" + what + ")"
		case r.Text != "":
			return what + " `" + escape(r.Text) + "`"
		}
		return what
	case s.Table != nil:
		what := "table " + tablePrefix(s) + escape(s.Table.Name) + " at " + tableHook(s)
		if s.Table.Unresolved != "" {
			return what + ", by which rule is unresolved: " + escape(s.Table.Unresolved)
		}
		if s.Table.Hotdrop != "" {
			return what + ": " + escape(s.Table.Hotdrop)
		}
		return what
	case s.Kind == events.StepHook:
		return "the hook " + hookTitle(place{pf: s.PF, hook: s.Hook}) + ", not by a rule that nftrace saw"
	}
	return ""
}

// outcome is the last line.
func (t *tree) outcome() {
	o := &t.j.Outcome
	where := ""
	if o.NetnsName != "" {
		where = " in namespace " + escape(o.NetnsName)
	}
	who := by(t.j)
	s, text := warning, ""
	decidedBy, r := decider(t.j)
	switch o.Kind {
	case events.OutSent:
		s, text = good, "accepted, sent out of "+device(o.Device)+where
	case events.OutDelivered:
		s, text = good, "accepted, delivered locally"+where
	case events.OutDropped:
		s, text = bad, "dropped"
		if r != nil && strings.HasPrefix(r.Action, "REJECT") {
			text = "rejected"
		}
		text += where
		switch {
		case who != "" && decidedBy.Table != nil && decidedBy.Verdict == events.NFQueue:
			text += " by the program that reads the queue, or as that ended: " + who
		case who != "":
			text += " by " + who
		default:
			text += ", by what is not known"
		}
	case events.OutStolen:
		text = "stolen" + where + ": kept by "
		if who == "" {
			who = "a hook that nftrace does not know"
		}
		text += who
		if r == nil && (decidedBy == nil || decidedBy.Table == nil) {
			text += " (a fragment waiting for the others, for example)"
		}
	case events.OutQueued:
		text = "queued to userspace" + where
		if who != "" {
			text += " by " + who
		}
		text += ", not seen again"
	case events.OutFreed:
		s, text = bad, "freed"+where+" without a verdict of a hook that nftrace saw (routing, fragmentation or reassembly, a missing neighbour …)"
	case events.OutUnknown, "":
		why := "tracing ended before the packet did"
		if t.j.Lost > 0 {
			why = "records of it were lost"
		}
		text = "unknown what became of it: " + why
	default:
		text = escape(string(o.Kind)) + where
		if who != "" {
			text += " by " + who
		}
	}
	t.add(2, s, "⇒ "+text)
}
