package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"unicode/utf8"

	"github.com/nftrace/nftrace/pkg/events"
)

// Schema names the form of what [JSON] writes. A field that is added keeps it;
// one that is renamed, removed or changes its meaning moves the number.
const Schema = "nftrace/1"

// Object is what [JSON] writes for one packet. Every field is always there:
// what does not apply is null, what is nothing is "", 0, false or [].
// Strings that were not UTF-8 have their bad bytes as the text \xNN.
type Object struct {
	Schema   string  `json:"schema"`    // Schema
	ID       uint64  `json:"id"`        // unique within one run of nftrace
	StartNS  int64   `json:"start_ns"`  // first sighting, ns since boot (CLOCK_MONOTONIC)
	Packet   Packet  `json:"packet"`    // as it was at the first sighting
	HalfSeen string  `json:"half_seen"` // why the beginning of the path is missing, or ""
	Lost     uint64  `json:"lost"`      // records of this packet that were lost: the path has a hole
	Steps    []Step  `json:"steps"`     // in the kernel's order
	Outcome  Outcome `json:"outcome"`
}

// Packet is the state of a packet at one moment.
type Packet struct {
	Summary   string   `json:"summary"`   // as Describe says it: for people, not part of the schema
	Family    string   `json:"family"`    // "ip", "ip6", "" for all else
	EtherType uint16   `json:"ethertype"` // 2048 for IPv4 …
	Length    int      `json:"length"`    // bytes from the network header on
	Src       *string  `json:"src"`       // address
	Dst       *string  `json:"dst"`
	Proto     *int     `json:"proto"` // transport protocol number; null if unknown
	SrcPort   *uint16  `json:"sport"`
	DstPort   *uint16  `json:"dport"`
	TCPFlags  []string `json:"tcp_flags"` // "SYN", "ACK", …
	ICMPType  *uint8   `json:"icmp_type"` // ICMP and ICMPv6
	ICMPCode  *uint8   `json:"icmp_code"`
	TTL       *int     `json:"ttl"`      // IPv6: hop limit
	FragOff   *int     `json:"frag_off"` // in bytes; null unless a fragment
	Truncated bool     `json:"truncated"`
	Mark      uint32   `json:"mark"`
	UID       *uint32  `json:"uid"` // null where no socket of this namespace owns the packet
	GID       *uint32  `json:"gid"`
	CT        string   `json:"ct"` // "NEW", "ESTABLISHED", "RELATED", "UNTRACKED", "" for none yet
	CTReply   bool     `json:"ct_reply"`
	VLAN      *int     `json:"vlan"` // tag beside the packet
}

// Device is an interface; null in its place means none.
type Device struct {
	Index int    `json:"index"`
	Name  string `json:"name"`
}

// Step is one thing that happened to the packet.
type Step struct {
	Kind      string  `json:"kind"` // "table", "hook", "nat", "flowtable", "bridge", "xmit", "deliver"
	TimeNS    int64   `json:"time_ns"`
	CPU       int     `json:"cpu"`
	Netns     uint32  `json:"netns"`      // inode number
	NetnsName string  `json:"netns_name"` // "" for nftrace's own
	Family    string  `json:"family"`     // "ip", "ip6", "bridge", "arp", …; "" but for table, flowtable and hook
	Hook      string  `json:"hook"`       // "PREROUTING" …; "" but for table, flowtable and hook
	In        *Device `json:"in"`
	Out       *Device `json:"out"`
	PhysIn    *Device `json:"phys_in"`
	PhysOut   *Device `json:"phys_out"`
	// Reinjected: of table, flowtable and hook, in what was left of the hook when a program that reads
	// NFQUEUE's queue sent the packet back.
	Reinjected bool       `json:"reinjected"`
	Unresolved string     `json:"unresolved"` // of kind hook: why its rules cannot be told, or ""
	Verdict    string     `json:"verdict"`    // "ACCEPT", "DROP", "STOLEN", "QUEUE", "REPEAT"; "" but for table and hook, or unknown
	Table      *Table     `json:"table"`      // of kind "table"
	NAT        *NAT       `json:"nat"`        // of kind "nat", and of "flowtable" where it rewrote the packet
	Flowtable  *Flowtable `json:"flowtable"`  // of kind "flowtable": it sent the packet on, past the hooks behind
}

// Flowtable is a flowtable of nf_tables.
type Flowtable struct {
	Family string `json:"family"` // "ip", "ip6", "inet": of its table
	Table  string `json:"table"`
	Name   string `json:"name"`
}

// Table is one run of one table.
type Table struct {
	Name       string  `json:"name"`
	Engine     string  `json:"engine"`     // "xtables" (iptables-, ebtables- and arptables-legacy) or "nf_tables"
	Family     string  `json:"family"`     // "ip", "ip6", "inet", …: of nf_tables the table's own
	BaseChain  string  `json:"base_chain"` // of nf_tables; "" otherwise
	Compat     bool    `json:"compat"`     // of nf_tables: iptables-nft or its kin manages it
	Unresolved string  `json:"unresolved"` // why rules cannot be told, or ""
	Hotdrop    string  `json:"hotdrop"`    // which match, not a rule, dropped the packet as malformed, or ""
	Before     Packet  `json:"before"`
	After      *Packet `json:"after"` // null where the packet was gone or is not known
	Rules      []Rule  `json:"rules"`
}

// Rule is one rule that matched, a policy, or a chain's end.
type Rule struct {
	Trace    string `json:"trace"` // "filter:FORWARD:rule:1", as in the trace format
	Chain    string `json:"chain"`
	Type     string `json:"type"` // TRACE's word: "rule", "return", "policy"
	Number   int    `json:"number"`
	Handle   uint64 `json:"handle"`    // of nf_tables; 0 where there is none
	Text     string `json:"text"`      // as the program that saves or lists it has it, without -A CHAIN
	IsPolicy bool   `json:"is_policy"` // the chain's policy; type says so of some rules too
	IsEnd    bool   `json:"is_end"`    // the end of a user chain
	Action   string `json:"action"`    // "ACCEPT", "jump DOCKER", "continue", "REJECT", "DROP (route it)" of table broute, …
	Depth    int    `json:"depth"`     // jumps that lead here
	// Packet is the packet when the rule matched, where it was no longer as
	// the table's before has it (after MARK, TTL, …); else null.
	Packet *Packet `json:"packet"`
	// PacketUnresolved says why it cannot be told how the packet was, or "".
	PacketUnresolved string `json:"packet_unresolved"`
}

// NAT is one rewrite.
type NAT struct {
	Manip   string `json:"manip"` // "source" or "destination"; "both" of a flowtable
	CTReply bool   `json:"ct_reply"`
	Before  Tuple  `json:"before"`
	After   Tuple  `json:"after"`
}

// Tuple is a pair of endpoints; for ICMP the ports are its identifier.
type Tuple struct {
	Proto   uint8  `json:"proto"`
	Src     string `json:"src"`
	SrcPort uint16 `json:"sport"`
	Dst     string `json:"dst"`
	DstPort uint16 `json:"dport"`
}

// Outcome is what became of the packet.
type Outcome struct {
	Kind      string  `json:"kind"` // "sent", "delivered", "dropped", "stolen", "queued", "freed", "unknown"
	Device    *Device `json:"device"`
	NetnsName string  `json:"netns_name"`
	Step      int     `json:"step"` // index into steps of what decided, or -1
	Rule      int     `json:"rule"` // index into that step's table.rules, or -1
	By        string  `json:"by"`   // that rule's trace, or ""
}

// JSON writes j as one [Object] on one line.
func JSON(w io.Writer, j *events.Journey) error {
	return writeOnce(w, NewJSON().Append(nil, j))
}

// NewJSON returns a Renderer that prints what [JSON] does.
func NewJSON() Renderer {
	var text bytes.Buffer
	return renderer(func(b []byte, j *events.Journey) []byte {
		text.Reset()
		return appendObject(b, &text, j)
	})
}

// appendObject has encoding/json write into text, which is empty, and appends that.
func appendObject(b []byte, text *bytes.Buffer, j *events.Journey) []byte {
	enc := json.NewEncoder(text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(object(j)); err != nil {
		// Object has no type that can fail.
		panic("render: " + err.Error())
	}
	return appendJSONSafe(b, text.Bytes())
}

// appendJSONSafe writes the runes that encoding/json lets through and a
// terminal would obey as \uNNNN. They can only stand in strings.
func appendJSONSafe(b, text []byte) []byte {
	from := 0
	for i := 0; i < len(text); {
		if c := text[i]; c == '\n' || c >= 0x20 && c < 0x7f {
			i++
			continue
		}
		r, n := utf8.DecodeRune(text[i:])
		if unsafeRune(r) {
			b = fmt.Appendf(append(b, text[from:i]...), `\u%04x`, r)
			from = i + n
		}
		i += n
	}
	return append(b, text[from:]...)
}

// str makes s UTF-8.
func str(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	b := make([]byte, 0, len(s)+8)
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 {
			b = append(b, '\\', 'x', hexDigits[s[i]>>4], hexDigits[s[i]&15])
		} else {
			b = append(b, s[i:i+n]...)
		}
		i += n
	}
	return string(b)
}

func ptr[T any](v T) *T { return &v }

func object(j *events.Journey) *Object {
	o := &Object{
		Schema:   Schema,
		ID:       j.ID,
		StartNS:  int64(j.Start),
		Packet:   packetObject(&j.First),
		HalfSeen: str(j.HalfSeen),
		Lost:     j.Lost,
		Steps:    make([]Step, 0, len(j.Steps)),
		Outcome: Outcome{
			Kind:      str(string(j.Outcome.Kind)),
			Device:    deviceObject(j.Outcome.Device),
			NetnsName: str(j.Outcome.NetnsName),
			Step:      -1,
			Rule:      -1,
		},
	}
	if s, r := decider(j); s != nil {
		o.Outcome.Step = j.Outcome.Step
		if r != nil {
			o.Outcome.Rule = j.Outcome.Rule
			o.Outcome.By = str(label(s, r))
		}
	}
	if o.Outcome.Kind == "" {
		o.Outcome.Kind = string(events.OutUnknown)
	}
	for i := range j.Steps {
		o.Steps = append(o.Steps, stepObject(&j.Steps[i]))
	}
	return o
}

func deviceObject(d events.Device) *Device {
	if d.Index == 0 && d.Name == "" {
		return nil
	}
	return &Device{Index: d.Index, Name: str(d.Name)}
}

func packetObject(p *events.Packet) Packet {
	h := parseHead(p)
	o := Packet{
		Summary:   Describe(p),
		EtherType: p.EtherType,
		Length:    p.Len,
		TCPFlags:  h.tcpFlags(),
		Truncated: h.short,
		Mark:      p.Mark,
		CT:        str(p.CT),
		CTReply:   p.CTReply,
	}
	switch p.Family {
	case events.PFIPv4, events.PFIPv6:
		o.Family = familyName(p.Family)
	}
	if h.ip {
		o.Src, o.Dst = ptr(h.src.String()), ptr(h.dst.String())
		o.TTL = ptr(h.ttl)
	}
	if h.proto >= 0 {
		o.Proto = ptr(h.proto)
	}
	if s, d, ok := h.ports(); ok {
		o.SrcPort, o.DstPort = ptr(s), ptr(d)
	}
	if t, c, ok := h.icmp(); ok {
		o.ICMPType, o.ICMPCode = ptr(t), ptr(c)
	}
	if h.frag {
		o.FragOff = ptr(h.fragOff)
	}
	if p.HasOwner {
		o.UID, o.GID = ptr(p.UID), ptr(p.GID)
	}
	if p.VLAN >= 0 {
		o.VLAN = ptr(p.VLAN)
	}
	return o
}

var kindNames = map[events.StepKind]string{
	events.StepTable: "table", events.StepHook: "hook", events.StepNAT: "nat",
	events.StepFlowtable: "flowtable", events.StepBridge: "bridge", events.StepXmit: "xmit", events.StepDeliver: "deliver",
}

func stepObject(s *events.Step) Step {
	o := Step{
		Kind:       kindNames[s.Kind],
		TimeNS:     int64(s.Time),
		CPU:        s.CPU,
		Netns:      s.Netns,
		NetnsName:  str(s.NetnsName),
		In:         deviceObject(s.In),
		Out:        deviceObject(s.Out),
		PhysIn:     deviceObject(s.PhysIn),
		PhysOut:    deviceObject(s.PhysOut),
		Reinjected: s.Reinjected,
	}
	if s.SentOn() {
		o.Unresolved = sentOn
	}
	switch s.Kind {
	case events.StepTable, events.StepFlowtable, events.StepHook:
		o.Family = familyName(s.PF)
		o.Hook = hookName(s.PF, s.Hook)
		o.Verdict = verdictName(s.Verdict)
	}
	if r := s.Table; r != nil {
		t := &Table{
			Name:       str(r.Name),
			Engine:     "xtables",
			Family:     familyName(s.PF),
			Unresolved: str(r.Unresolved),
			Hotdrop:    str(r.Hotdrop),
			Before:     packetObject(r.Before),
			Rules:      make([]Rule, 0, len(r.Rules)),
		}
		if n := r.NFT; n != nil {
			t.Engine, t.Family, t.BaseChain, t.Compat = "nf_tables", familyName(n.Family), str(n.Chain), n.Compat
		}
		if r.After != nil {
			t.After = ptr(packetObject(r.After))
		}
		for i := range r.Rules {
			t.Rules = append(t.Rules, ruleObject(s, i))
		}
		o.Table = t
	}
	if f := s.Flowtable; f != nil {
		o.Flowtable = &Flowtable{Family: familyName(f.Family), Table: str(f.Table), Name: str(f.Name)}
	}
	if n := s.NAT; n != nil {
		manip := "destination"
		switch {
		case s.Flowtable != nil:
			manip = "both"
		case n.Source:
			manip = "source"
		}
		o.NAT = &NAT{Manip: manip, CTReply: n.CTReply, Before: tupleObject(n.Before), After: tupleObject(n.After)}
	}
	return o
}

func ruleObject(s *events.Step, i int) Rule {
	r := &s.Table.Rules[i]
	pkt, unsure := s.Table.Packet(i)
	o := Rule{
		Trace:            str(label(s, r)),
		Chain:            str(r.Chain),
		Type:             str(string(r.Type)),
		Number:           r.Num,
		Handle:           r.Handle,
		Text:             str(r.Text),
		IsPolicy:         r.IsPolicy,
		IsEnd:            r.IsEnd,
		Action:           str(r.Action),
		Depth:            r.Depth,
		PacketUnresolved: str(unsure),
	}
	switch {
	case pkt == nil && o.PacketUnresolved == "":
		o.PacketUnresolved = notCaptured
	case pkt != nil && !samePacket(pkt, s.Table.Before):
		o.Packet = ptr(packetObject(pkt))
	}
	return o
}

func samePacket(a, b *events.Packet) bool {
	if !bytes.Equal(a.Data, b.Data) || !bytes.Equal(a.MAC, b.MAC) {
		return false
	}
	x, y := *a, *b
	x.Data, x.MAC, y.Data, y.MAC = nil, nil, nil, nil
	return reflect.DeepEqual(x, y)
}

func tupleObject(t events.Tuple) Tuple {
	addr := func(a netip.AddrPort) string {
		if !a.IsValid() {
			return ""
		}
		return a.Addr().WithZone("").String()
	}
	return Tuple{Proto: t.Proto, Src: addr(t.Src), SrcPort: t.Src.Port(), Dst: addr(t.Dst), DstPort: t.Dst.Port()}
}
