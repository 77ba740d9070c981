package oracle

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/testenv/topo"
)

// NFTTable is the name of the tables that [StartNFT] adds. What the kernel says of
// them is dropped.
const NFTTable = "nftrace_oracle"

// nftPriority is before every base chain that a test may have, however odd its priority;
// INT_MIN itself is br_netfilter's.
const nftPriority = -2000000000

// An NFT records the kernel's own trace of packets through nf_tables in one namespace:
// the messages that `nft monitor trace` prints.
type NFT struct {
	// Ruleset is what was loaded at the start.
	Ruleset *NFTRuleset

	ns       string
	families []string // of the oracle's tables
	conn     *netlink.Conn
	events   []NFTEvent
	packets  int
}

// NFTEvent is one NFT_MSG_TRACE (net/netfilter/nf_tables_trace.c:nft_trace_notify).
type NFTEvent struct {
	Family string // of the table
	Table  string
	Chain  string
	Handle uint64 // of the rule; 0 at the end of a chain and for a policy
	Type   uint32 // NFT_TRACETYPE_*
	Code   int32  // the verdict: NF_* or NFT_*; not for a policy
	Target string // of a jump or goto
	Policy uint32 // NF_*
	ID     uint32 // of the packet while it is in one base chain
	PF     uint8  // NFPROTO_* that is processed
	Mark   uint32
	// These are there in the first message of a base chain only.
	In, Out            uint32 // interface indexes
	Network, Transport []byte // the beginnings of headers
}

// From include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
const (
	traceTypePolicy = 1
	traceTypeReturn = 2
	traceTypeRule   = 3

	traceTable     = 1
	traceChain     = 2
	traceHandle    = 3
	traceType      = 4
	traceVerdict   = 5
	traceID        = 6
	traceNetwork   = 8
	traceTransport = 9
	traceIIF       = 10
	traceOIF       = 12
	traceMark      = 14
	traceNFProto   = 15
	tracePolicy    = 16

	verdictCode  = 1
	verdictChain = 2

	groupTrace = 9 // NFNLGRP_NFTRACE
)

// StartNFT makes the kernel tell the path of every packet of the namespace, as far as it
// leads through nf_tables, from a table of its own on: inet, from prerouting and output
// on. Others of families, "bridge", "arp" and "netdev", get tables where they are named.
func StartNFT(ctx context.Context, ns string, families ...string) (*NFT, error) {
	if os.Getenv("NFTRACE_IN_VM") != "1" {
		return nil, errors.New("oracle: it changes rules: run it in a VM (testenv/cmd/vm)")
	}
	o := &NFT{ns: ns}
	if err := o.start(ctx, append([]string{"inet"}, families...)); err != nil {
		o.Close(context.WithoutCancel(ctx))
		return nil, fmt.Errorf("oracle: namespace %s: %w", ns, err)
	}
	return o, nil
}

func (o *NFT) start(ctx context.Context, families []string) error {
	netns, err := os.Open("/run/netns/" + o.ns)
	if err != nil {
		return err
	}
	defer netns.Close()
	if o.Ruleset, err = readRuleset(int(netns.Fd())); err != nil {
		return err
	}
	if o.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: int(netns.Fd())}); err != nil {
		return err
	}
	// Nothing is read before the traffic is over.
	if err := o.conn.SetReadBuffer(128 << 20); err != nil {
		return err
	}
	if err := o.conn.JoinGroup(groupTrace); err != nil {
		return err
	}
	for _, f := range families {
		hooks := oracleHooks[f]
		err := loadOracleTable(ctx, o.ns, f, hooks)
		if f == "netdev" && err != nil && strings.Contains(err.Error(), "Operation not supported") {
			// Before Linux 5.16 there is no egress.
			err = loadOracleTable(ctx, o.ns, f, hooks[:1])
		}
		if err != nil {
			return err
		}
		o.families = append(o.families, f)
	}
	return nil
}

// oracleHooks are the hooks of a family at which the oracle's chains are.
var oracleHooks = map[string][]string{
	"inet":   {"prerouting", "output"},
	"bridge": {"prerouting", "output"},
	"arp":    {"input", "output"},
	"netdev": {"ingress", "egress"},
}

// loadOracleTable loads the table of one family that sets nf_trace of all packets at some hooks.
func loadOracleTable(ctx context.Context, ns, family string, hooks []string) error {
	if len(hooks) == 0 {
		return fmt.Errorf("no table of family %q", family)
	}
	device := ""
	if family == "netdev" {
		var names []string
		err := topo.Within(ns, func() error {
			links, err := net.Interfaces()
			for _, l := range links {
				names = append(names, l.Name)
			}
			return err
		})
		if err != nil {
			return err
		}
		device = " devices = { " + strings.Join(names, ", ") + " }"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", family, NFTTable)
	for _, h := range hooks {
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype filter hook %s%s priority %d; policy accept;\n\t\tmeta nftrace set 1\n\t}\n", h, h, device, nftPriority)
	}
	b.WriteString("}\n")
	return topo.Load(ctx, ns, "nft", b.String())
}

// Close takes the oracle's tables away.
func (o *NFT) Close(ctx context.Context) error {
	var errs []error
	if o.conn != nil {
		errs = append(errs, o.conn.Close())
	}
	for _, f := range o.families {
		errs = append(errs, run(ctx, "", "ip", "netns", "exec", o.ns, "nft", "delete table "+f+" "+NFTTable))
	}
	return errors.Join(errs...)
}

// Events returns all that the kernel told since the start, without what it told of the
// oracle's own tables. A packet's messages are in the socket when the packet has passed,
// so there is nothing to wait for. It fails if one was lost.
func (o *NFT) Events() ([]NFTEvent, error) {
	// The end is the answer to a question: what comes after it belongs to the next call.
	ask, err := o.conn.Send(nftRequest(unix.NFT_MSG_GETGEN, 0))
	if err != nil {
		return nil, fmt.Errorf("oracle: %w", err)
	}
	for {
		msgs, err := o.conn.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			return nil, errors.New("oracle: the socket's buffer has overrun: messages are lost; read more often")
		case err != nil:
			return nil, fmt.Errorf("oracle: %w", err)
		}
		for _, m := range msgs {
			switch {
			case m.Header.Type == nftType(unix.NFT_MSG_NEWGEN) && m.Header.Sequence == ask.Header.Sequence:
				return o.events, nil
			case m.Header.Type == nftType(unix.NFT_MSG_TRACE):
				e, err := parseNFTEvent(m.Data)
				if err != nil {
					return nil, err
				}
				switch {
				case e.Table != NFTTable:
					o.events = append(o.events, e)
				case e.Handle != 0 && e.Family == "inet":
					o.packets++
				}
			}
		}
	}
}

// Packets is how often a packet has begun its way through the namespace, as far as
// [NFT.Events] has read.
func (o *NFT) Packets() int { return o.packets }

func nftType(msg int) netlink.HeaderType {
	return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg)
}

func nftRequest(msg int, flags netlink.HeaderFlags) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: nftType(msg), Flags: netlink.Request | flags},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}, // struct nfgenmsg
	}
}

// parseNFT calls f for each attribute of a message of nfnetlink, and returns the
// family that stands before them.
func parseNFT(data []byte, f func(*netlink.AttributeDecoder)) (family string, err error) {
	if len(data) < 4 {
		return "", fmt.Errorf("oracle: a message of %d bytes", len(data))
	}
	d, err := netlink.NewAttributeDecoder(data[4:])
	if err != nil {
		return "", fmt.Errorf("oracle: %w", err)
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		f(d)
	}
	if err := d.Err(); err != nil {
		return "", fmt.Errorf("oracle: %w", err)
	}
	return nftFamily(data[0]), nil
}

func parseNFTEvent(data []byte) (e NFTEvent, err error) {
	e.Family, err = parseNFT(data, func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case traceTable:
			e.Table = d.String()
		case traceChain:
			e.Chain = d.String()
		case traceHandle:
			e.Handle = d.Uint64()
		case traceType:
			e.Type = d.Uint32()
		case traceVerdict:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					switch d.Type() {
					case verdictCode:
						e.Code = d.Int32()
					case verdictChain:
						e.Target = d.String()
					}
				}
				return nil
			})
		case traceID:
			e.ID = d.Uint32()
		case traceNetwork:
			e.Network = bytes.Clone(d.Bytes())
		case traceTransport:
			e.Transport = bytes.Clone(d.Bytes())
		case traceIIF:
			e.In = d.Uint32()
		case traceOIF:
			e.Out = d.Uint32()
		case traceMark:
			e.Mark = d.Uint32()
		case traceNFProto:
			e.PF = uint8(d.Uint32())
		case tracePolicy:
			e.Policy = d.Uint32()
		}
	})
	switch {
	case err != nil:
	case e.Table == "" || e.Chain == "":
		err = fmt.Errorf("oracle: a trace message without table or chain: %x", data)
	case e.Type < traceTypePolicy || e.Type > traceTypeRule:
		err = fmt.Errorf("oracle: a trace message of type %d: %x", e.Type, data)
	}
	return e, err
}

// nftFamily is the name that nft has for a family (NFPROTO_*).
func nftFamily(pf uint8) string {
	switch pf {
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_ARP:
		return "arp"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	case unix.NFPROTO_IPV6:
		return "ip6"
	}
	return fmt.Sprintf("family %d", pf)
}

// NFTRuleset says where rules stand.
type NFTRuleset struct {
	// Compat has the tables, as "ip filter", that iptables-nft or one of its kin made.
	// The kernel does not know.
	Compat map[string]bool

	chains map[nftChainKey]*nftChain
	rules  map[nftRuleKey]*nftRule
}

type nftChainKey struct{ family, table, name string }

type nftRuleKey struct {
	family, table string
	handle        uint64 // unique within a table
}

type nftChain struct {
	hook  string // of a base chain, as nftrace spells it; else ""
	rules int
}

type nftRule struct {
	chain  string
	number int // from 1
	// always is set where nothing stands before the verdict but a counter: what
	// iptables calls unconditional.
	always bool
}

// readRuleset asks the kernel for chains and rules, in the namespace of a file.
func readRuleset(netns int) (*NFTRuleset, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	rs := &NFTRuleset{chains: map[nftChainKey]*nftChain{}, rules: map[nftRuleKey]*nftRule{}}
	for _, dump := range []struct {
		msg int
		add func(data []byte) error
	}{
		{unix.NFT_MSG_GETCHAIN, rs.addChain},
		{unix.NFT_MSG_GETRULE, rs.addRule},
	} {
		msgs, err := conn.Execute(nftRequest(dump.msg, netlink.Dump))
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			if err := dump.add(m.Data); err != nil {
				return nil, err
			}
		}
	}
	return rs, nil
}

func (rs *NFTRuleset) addChain(data []byte) error {
	var k nftChainKey
	c := &nftChain{}
	hook, base := uint32(0), false
	family, err := parseNFT(data, func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case unix.NFTA_CHAIN_TABLE:
			k.table = d.String()
		case unix.NFTA_CHAIN_NAME:
			k.name = d.String()
		case unix.NFTA_CHAIN_HOOK:
			base = true
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					if d.Type() == unix.NFTA_HOOK_HOOKNUM {
						hook = d.Uint32()
					}
				}
				return nil
			})
		}
	})
	if err != nil {
		return err
	}
	if base {
		if c.hook = nftHook(family, hook); c.hook == "" {
			return fmt.Errorf("oracle: chain %s is at hook %d of %s", k.name, hook, family)
		}
	}
	k.family = family
	rs.chains[k] = c
	return nil
}

// nftHook is nftrace's name of a hook.
func nftHook(family string, hook uint32) string {
	names := []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "INGRESS"}
	switch family {
	case "arp":
		names = []string{"INPUT", "OUTPUT", "FORWARD"}
	case "netdev":
		names = []string{"INGRESS", "EGRESS"}
	}
	if int(hook) >= len(names) {
		return ""
	}
	return names[hook]
}

func (rs *NFTRuleset) addRule(data []byte) error {
	var chain nftChainKey
	var handle uint64
	r := &nftRule{always: true}
	family, err := parseNFT(data, func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case unix.NFTA_RULE_TABLE:
			chain.table = d.String()
		case unix.NFTA_RULE_CHAIN:
			chain.name = d.String()
		case unix.NFTA_RULE_HANDLE:
			handle = d.Uint64()
		case unix.NFTA_RULE_EXPRESSIONS:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					d.Nested(func(d *netlink.AttributeDecoder) error {
						for d.Next() {
							if d.Type() == unix.NFTA_EXPR_NAME && !slices.Contains([]string{"counter", "immediate"}, d.String()) {
								r.always = false
							}
						}
						return nil
					})
				}
				return nil
			})
		}
	})
	if err != nil {
		return err
	}
	chain.family = family
	c := rs.chains[chain]
	if c == nil {
		return fmt.Errorf("oracle: a rule in chain %v, which is not there", chain)
	}
	c.rules++
	r.chain, r.number = chain.name, c.rules
	rs.rules[nftRuleKey{family, chain.table, handle}] = r
	return nil
}

// Number is the position of an event's rule in its chain, from 1; 0 if it has none.
func (rs *NFTRuleset) Number(e NFTEvent) int {
	if r := rs.rules[nftRuleKey{e.Family, e.Table, e.Handle}]; r != nil {
		return r.number
	}
	return 0
}
