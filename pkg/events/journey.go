package events

import (
	"net/netip"
	"time"

	"github.com/nftrace/nftrace/bpf"
)

// Netfilter verdicts (include/uapi/linux/netfilter.h).
const (
	NFDrop   = 0
	NFAccept = 1
	NFStolen = 2
	NFQueue  = 3
	NFRepeat = 4
)

// VerdictUnknown stands for a verdict that is not known.
const VerdictUnknown = -1

// Netfilter hooks of the inet families (include/uapi/linux/netfilter.h);
// those of the bridge family have the same numbers.
const (
	HookPreRouting  = 0
	HookLocalIn     = 1
	HookForward     = 2
	HookLocalOut    = 3
	HookPostRouting = 4
	HookIngress     = 0 // of family netdev
	HookEgress      = 1 // likewise
	HookBrouting    = 5 // of ebtables' table broute, within the bridge's PREROUTING
)

// Protocol families as netfilter numbers them (NFPROTO_*).
const (
	PFInet   = 1
	PFIPv4   = 2
	PFARP    = 3
	PFNetdev = 5
	PFBridge = 7
	PFIPv6   = 10
)

// Journey is the path of one packet, from the first hook at which nftrace saw
// it to its last.
type Journey struct {
	ID    uint64
	Start time.Duration // since boot (CLOCK_MONOTONIC) at the first sighting
	First Packet        // the packet as it was at the first sighting
	Steps []Step        // in the order in which the kernel took them

	// HalfSeen is set where the packet had passed hooks before nftrace
	// began to follow it (the filter matched only later, or nftrace
	// attached in the middle); it says why, in words, and is empty otherwise.
	HalfSeen string
	// Lost counts records of this journey that the kernel could not
	// hand over (a hole in the path).
	Lost uint64

	Outcome Outcome

	ended   bool    // the packet is gone
	dropped bool    // by a call of a hook of which nothing is known
	refused bool    // by the program that read its queue, or as that ended
	seen    *Packet // as it was seen last
}

// Packet is the head of a packet as a probe saw it.
type Packet struct {
	Family uint8 // PFIPv4, PFIPv6, or 0 where the packet is neither (ARP …)
	// EtherType is skb->protocol in host byte order.
	EtherType uint16
	// Len is skb->len in bytes, counted from the network header.
	Len int
	// Data holds the bytes from the network header on, as many as were
	// captured (at least all headers that TRACE prints, where they are linear).
	Data []byte
	// MAC holds dev->hard_header_len bytes from the link-layer header on;
	// nil where dev has no such header or the packet has none.
	MAC []byte
	// MACDevType is the type (ARPHRD_*) of skb->dev, to which MAC belongs.
	MACDevType uint16
	Mark       uint32
	// HasOwner is set where a full socket of this namespace with an open file
	// owns the packet; UID and GID are then f_cred's fsuid and fsgid.
	HasOwner bool
	UID, GID uint32
	// CT is the conntrack state: "" (none yet), "NEW", "ESTABLISHED",
	// "RELATED", "UNTRACKED" ("INVALID" cannot be told from none).
	CT string
	// CTReply is set for packets in the reply direction of their connection.
	CTReply bool
	// HasCTMark is set where the packet has a conntrack entry and its mark is known; CTMark
	// is that then, and CTConfirmed is clear as long as no packet of its connection has
	// passed the last hook.
	HasCTMark, CTConfirmed bool
	CTMark                 uint32
	// VLAN is the 802.1Q tag beside the packet (skb->vlan_tci), -1 for none.
	VLAN int
}

// Device names an interface at the time of the step. Index 0 means none.
type Device struct {
	Index int
	Name  string
}

// StepKind tells which of a Step's fields hold.
type StepKind uint8

const (
	// StepTable: one run of a table at a hook (ipt_do_table, ip6t_do_table, ebt_do_table).
	StepTable StepKind = iota + 1
	// StepHook: the verdict of a hook as a whole (a call of nf_hook_slow).
	StepHook
	// StepNAT: addresses or ports were rewritten (nf_nat_manip_pkt).
	StepNAT
	// StepFlowtable: a flowtable sent the packet on, past routing and the hooks behind
	// ingress, where it happened (nf_flow_offload_ip_hook, nf_flow_offload_ipv6_hook). NAT is
	// set where it rewrote the packet.
	StepFlowtable
	// StepBridge: the bridge chose the port that Out names (br_forward).
	StepBridge
	// StepXmit: the packet was handed to device Out (in __dev_queue_xmit).
	StepXmit
	// StepDeliver: the packet was handed to the local protocol
	// (ip_local_deliver_finish, ip6_protocol_deliver_rcu).
	StepDeliver
)

// SentOn tells whether a step is a hook at a device's ingress from where something sent the packet out of
// another device, and nothing told of it.
func (s *Step) SentOn() bool {
	return s.Kind == StepHook && s.Verdict == NFStolen && s.PF == PFNetdev && s.Hook == HookIngress
}

// Place is where a step happened. It is shared by all steps of all packets there: nobody
// but events changes it.
type Place struct {
	Netns uint32 // inode number of the network namespace

	PF   uint8 // PFIPv4, PFIPv6, PFBridge …; for StepTable, StepFlowtable and StepHook
	Hook uint8 // HookPreRouting …; for StepTable, StepFlowtable and StepHook
	// In, Out are nf_hook_state's devices; PhysIn, PhysOut the bridge ports
	// (nf_bridge_info) where br_netfilter handed the packet to the IP hooks.
	In, Out, PhysIn, PhysOut Device
	// Reinjected is set where a program that reads a queue of NFQUEUE sent the packet back: what
	// was left of the hook ran then (nfqnl_reinject).
	Reinjected bool

	named int // Assembler.named when PhysIn.Name was looked up
}

// Step is one thing that happened to the packet.
type Step struct {
	*Place // never nil

	Kind StepKind
	Time time.Duration // since boot (CLOCK_MONOTONIC)
	CPU  int
	// NetnsName is the namespace's name for people ("" for the one that
	// nftrace runs in; "c1", a container's name, or "net:[4026532…]").
	NetnsName string

	// Verdict is NF_* or VerdictUnknown; for StepTable what the table returned, for
	// StepHook NFAccept where the packet went on, NFDrop where the hook dropped it.
	// A table behind whose rules the packet did not go on is unknown until its rules
	// are known.
	Verdict int

	Table     *TableRun  // StepTable
	NAT       *NAT       // StepNAT, StepFlowtable
	Flowtable *Flowtable // StepFlowtable
}

// Flowtable is a flowtable of nf_tables.
type Flowtable struct {
	Family      uint8  // of its table: PFInet …
	Table, Name string // of which records have 31 bytes at the most
}

// TableRun is one run of one table: of nf_tables, of one base chain. Rules is what the
// table did, in order; it is empty where Unresolved is not.
type TableRun struct {
	Name string // "filter", "nat", …
	// NFT is what nf_tables told; nil for xtables and ebtables, of whose runs Hits tell.
	NFT *NFTRun
	// EBT is what is known of a run of ebtables; nil for others.
	EBT *EBTRun
	// ID identifies this very ruleset: the kernel's xt_table_info (ebt_table_info) address
	// and a generation that makes it unique over address reuse.
	ID TableID
	// Hits are the rules whose counters grew, in blob order.
	Hits []Hit
	// Part is the part of the hook's call in which the table ran.
	Part *Part
	// Before and After are the packet as the table got it and as it left it.
	// After is nil where the packet was gone (dropped, stolen) or is not known.
	// Events knows Part's packets only, and Before is the Part's but for its conntrack
	// state: see SetBefore.
	Before, After *Packet

	// Rules are shared by all runs that did the same: nobody changes them. Met tells which
	// packet each met.
	Rules []Rule
	Met   []Met
	// Unresolved is the cause, in words, why Rules cannot be told exactly.
	Unresolved string
	// Hotdrop is set where a match, not a rule, dropped the packet behind the last
	// of Rules (it found the packet malformed); it says, in words, which it can be.
	Hotdrop string

	before Packet // Before, where it is no other's
	hits   []Hit  // Hits, where they are not the pattern's
	nft    NFTRun // what NFT is
	ebt    EBTRun // what EBT is
}

// EBTRun is a run of a table of ebtables (ebt_do_table).
type EBTRun struct {
	Hook    uint8 // of the chain where it began: HookBrouting, or the step's
	Verdict int   // what it returned: NFAccept or NFDrop. At HookBrouting NFDrop routes the packet
	// Behind is the packet behind the run, where it was another than before it.
	Behind *Packet
}

// NFTRun is what nf_tables told of the run of one base chain.
type NFTRun struct {
	Family uint8  // of the table: PFInet …
	Table  uint64 // handle, unique within the namespace
	Base   uint64 // handle of the base chain, unique within the table
	// Chain is the base chain's name, of which records have 31 bytes at the most; all of
	// it once the ruleset is known.
	Chain string
	Gen   uint32 // of the namespace's rulesets (NFTA_GEN_ID)
	// Flipped is set where Gen came into force on another CPU at about the time when the
	// run began: it may have met the generation before.
	Flipped bool
	// Runs is the number of xtables' tables that the part ran through before.
	Runs   int
	Events []NFTEvent
	// Behind is the packet behind the last event, where it was another than before it.
	Behind *Packet

	// What the ruleset says, once it is known.

	// Compat is set for tables of iptables-nft and its kin, which are named as their users
	// know them.
	Compat bool
	Type   string // the base chain's: "filter", "nat", "route"
	// Priority is the base chain's: lower ones run first.
	Priority int
	// NAT is set where the namespace has base chains of type nat for such packets.
	NAT bool
	// LeavesConn is set where no rule of the namespace sets the marks of connections.
	LeavesConn bool
}

// NFTEvent is one call of net/netfilter/nf_tables_core.c:__nft_trace_packet.
type NFTEvent struct {
	What NFTWhat
	Rule uint64 // handle, of NFTRule; unique within the table and never used again
	// Chain is the handle of the chain where NFTJump and NFTGoto lead, or whose end it is.
	Chain uint64
	Code  int // the verdict: NF…, or negative: NFT…
	// Packet is the packet that the rule met. Unsure is set where it may have been changed
	// before it came to the rule.
	Packet *Packet
	Unsure bool
	// CT and Reply are its conntrack state.
	CT    string
	Reply bool
}

// NFTWhat tells what an NFTEvent is about.
type NFTWhat uint8

// What nf_tables tells of.
const (
	NFTRule   NFTWhat = iota + 1 // a rule ran to its end
	NFTEnd                       // the end of a chain was reached
	NFTPolicy                    // a base chain's policy decided
)

// Verdicts of nf_tables within chains (include/uapi/linux/netfilter/nf_tables.h).
const (
	NFTContinue = -1
	NFTBreak    = -2
	NFTJump     = -3
	NFTGoto     = -4
	NFTReturn   = -5
)

// SetBefore makes Before the packet p in that conntrack state.
func (t *TableRun) SetBefore(p *Packet, ct string, reply bool) {
	if p.CT != ct || p.CTReply != reply {
		if p != &t.before {
			t.before = *p
		}
		p = &t.before
		p.CT, p.CTReply = ct, reply
	}
	t.Before = p
}

// Met is the packet that the rules of a run met from one on, up to the next Met's.
type Met struct {
	From int // index into Rules
	// Pkt is the packet when these rules matched, before their targets ran (what TRACE
	// prints); nil where it cannot be told, for the cause that Unsure is.
	Pkt    *Packet
	Unsure string
}

// Packet returns what the i-th rule met: the packet, or nil and the cause.
func (t *TableRun) Packet(i int) (*Packet, string) {
	for n := len(t.Met) - 1; n >= 0; n-- {
		if m := &t.Met[n]; m.From <= i {
			return m.Pkt, m.Unsure
		}
	}
	return nil, ""
}

// Part is a call of a hook, or what lies before, between and behind the calls of
// nf_nat_manip_pkt in it.
type Part struct {
	// Before is the packet at the call. AfterNAT is set for all parts but the first: in
	// them it is the packet as it was where the part ended, but for the mark, and Before.Data
	// is nil where that is not known.
	Before   Packet
	AfterNAT bool
	// End is the packet where a part behind NAT ended, if Before has another mark: the one from NAT.
	// MarkKnown is set where Before has that one, and nf_tables told of all that it did in the part.
	End       *Packet
	MarkKnown bool
	// After is the packet when it was next seen; its devices and its TTL (hop
	// limit), which routing decrements, may have changed behind the hook. It is nil where
	// the packet is not known, or was gone.
	After *Packet
	// NATUnseen is set where NAT gave the packet After's destination within the part, at OUTPUT, and
	// its probe did not tell: the kernel skips one that is hit while it runs on that CPU already.
	// Tables behind nat, which are filter and security, met the packet as After has it.
	NATUnseen bool
	// Unseen is set where nobody looked at the packet behind the part: After is nil then, whatever
	// became of it.
	Unseen bool
	// Tracked is set where the packet had a conntrack entry behind the part.
	Tracked bool
	// Verdict is NFAccept where the packet went on behind the part, else NFDrop
	// or VerdictUnknown.
	Verdict int
	// Changed is set where nf_tables changed the packet within the part, or may have: what
	// xtables' tables met hangs on where among them they ran.
	Changed bool
	// Pattern is that of the part's record. It is nil where the part's tables and their
	// hits do not follow from it and the length of the packet.
	Pattern *Pattern

	after               Packet         // After, where it is no other's
	rawBefore, rawAfter bpf.NftracePkt // what Before and After have slices of
}

// TableID identifies one generation of one table.
type TableID struct {
	Private uint64 // struct xt_table_info *
	Gen     uint64
}

// Hit is one rule counter that grew.
type Hit struct {
	Index   int    // position of the ipt_entry in the table's blob, from 0
	Packets uint64 // by how much the packet counter grew
	Bytes   uint64 // by how much the byte counter grew
}

// RuleType is the word that TRACE prints between chain and number.
type RuleType string

// The three words of net/ipv4/netfilter/ip_tables.c:trace_packet.
const (
	TypeRule   RuleType = "rule"
	TypeReturn RuleType = "return"
	TypePolicy RuleType = "policy"
)

// Rule is one line that TRACE would log, with what people want to know of it.
type Rule struct {
	Chain string
	Type  RuleType
	Num   int // position in the chain, from 1
	// Handle is nf_tables' own number of the rule; 0 for none.
	Handle uint64
	// Text is the rule as iptables-save prints it without "-A CHAIN ",
	// "" where there is no such line (policy, end of a chain).
	Text string
	// IsPolicy is set for a built-in chain's policy, IsEnd for the end of a user
	// chain: Type alone does not tell (TRACE calls every unconditional
	// ACCEPT or DROP of a built-in chain "policy").
	IsPolicy, IsEnd bool
	// Action is what the rule did: "ACCEPT", "DROP", "QUEUE", "RETURN",
	// "jump DOCKER", "goto DOCKER", "continue" (no verdict: MARK, LOG, no target …),
	// or the target's name where it ended the table's run ("REJECT", "DNAT").
	Action string
	// Depth is the number of jumps that lead here, 0 in a built-in chain.
	Depth int
	// TracePrefix is render.TracePrefix of the rule, or empty: it is the same for all
	// packets.
	TracePrefix string
}

// NAT is one rewrite by nf_nat_manip_pkt, or by a flowtable.
type NAT struct {
	// Source is set where the source was to be rewritten (NF_NAT_MANIP_SRC),
	// clear for the destination; a flowtable rewrites both at once, and leaves it clear.
	Source bool
	// CTReply is the conntrack direction of the packet.
	CTReply bool
	// Before and After are addresses and ports (ICMP: identifier as port).
	Before, After Tuple
}

// Tuple is a pair of endpoints.
type Tuple struct {
	Proto    uint8
	Src, Dst netip.AddrPort
}

// OutcomeKind says how a journey ended.
type OutcomeKind string

// The outcomes. Their values are part of the JSON schema.
const (
	OutSent      OutcomeKind = "sent"      // handed to Device and not seen again
	OutDelivered OutcomeKind = "delivered" // handed to a local socket or protocol
	OutDropped   OutcomeKind = "dropped"   // a verdict dropped it: see Step and Rule
	OutStolen    OutcomeKind = "stolen"    // a hook kept it (fragment queued, SYNPROXY …)
	OutQueued    OutcomeKind = "queued"    // handed to userspace by NFQUEUE, if anybody is there, and not seen again
	OutFreed     OutcomeKind = "freed"     // freed without a verdict known to nftrace
	OutUnknown   OutcomeKind = "unknown"   // tracing ended first, or records were lost
)

// Outcome is what became of the packet.
type Outcome struct {
	Kind   OutcomeKind
	Device Device // OutSent
	// NetnsName is where it happened.
	NetnsName string
	// Step and Rule are indices into Steps and Steps[Step].Table.Rules of what
	// decided, -1 where nothing did.
	Step, Rule int
}
