package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// NFTRuleset is what a network namespace's nf_tables hold in one generation.
type NFTRuleset struct {
	Gen    uint32      // NFTA_GEN_ID: the namespace's nft base_seq
	Tables []*NFTTable // in the kernel's order, as are their chains and rules
	// SetsConn is set where a rule sets something of connections, or may: their marks.
	SetsConn bool

	tables map[uint64]*NFTTable
}

// NFTTable is a table of nf_tables.
type NFTTable struct {
	Family uint8 // NFPROTO_*: 1 inet, 2 ip, 3 arp, 5 netdev, 7 bridge, 10 ip6
	Name   string
	Handle uint64
	// Compat is set for tables that iptables-nft, ip6tables-nft, ebtables-nft or
	// arptables-nft manage: they are named as those users know them. Such a table
	// has a family and a name of theirs, at least one base chain, and no base
	// chain that differs from theirs (iptables/nft.c:xtables_ipv4, xtables_arp,
	// xtables_bridge) in name, hook, type or priority. Its rules do not matter:
	// who puts a native rule into a table of iptables' knows it by iptables' names.
	Compat bool
	Chains []*NFTChain

	// By handle; handles count per table.
	chains map[uint64]*NFTChain
	rules  map[uint64]*NFTRule

	printed bool // all rules have the texts that a program printed
}

// NFTChain is a chain of nf_tables.
type NFTChain struct {
	Name     string
	Handle   uint64
	Table    *NFTTable
	Base     bool   // what follows, but for Rules, is about base chains
	Type     string // "filter", "nat", "route"
	Hook     uint8  // NF_INET_*, NF_BR_*, NF_ARP_*, NF_NETDEV_*
	Priority int32
	Policy   int // NF_ACCEPT 1 or NF_DROP 0
	Rules    []*NFTRule

	// anonymous chains belong to one rule: "jump { … }".
	anonymous bool
	devices   bool // a base chain of devices
}

// NFTRule is a rule of nf_tables.
type NFTRule struct {
	Handle uint64
	Chain  *NFTChain
	Num    int // position in the chain, from 1, as iptables -L --line-numbers has it
	// Unconditional: no match at all, only counters, and a verdict, a target or
	// native statements.
	Unconditional bool
	// Target is the xtables target's name or the native statement that ends or
	// acts last ("REJECT", "LOG"; native "reject", "masquerade", "dnat", "snat",
	// "redirect", "queue", "log", "tproxy", "notrack" …), "" where the last is a
	// plain verdict. In Compat tables statements have the names of targets.
	Target string
	Text   string // "" until ReadTexts

	verdict int32  // of the last plain verdict: NF_* or NFT_*; NFT_CONTINUE without
	dest    string // of a jump or goto: the chain's name
	native  string // what nftrace itself makes of the expressions
	// ChainPolicy marks the rule that ebtables-nft keeps at the end of a user-defined
	// chain for its policy, and lists as no rule.
	ChainPolicy bool
	foreign     bool     // not by iptables-nft
	setsConn    bool     // the marks of connections, or it may
	modules     []string // what iptables-nft-save loads to print it
}

// Attributes and flags of include/uapi/linux/netfilter/nf_tables.h that
// x/sys/unix does not have.
const (
	nftaTableHandle = 4
	nftaChainFlags  = 10
	nftaHookDevs    = 4
	nftChainBinding = 1 << 2

	// iptables/nft.c:enum udata_type, in NFTA_RULE_USERDATA.
	udataEbtablesPolicy = 1
)

// compatTables are the tables and base chains of the xtables-nft programs.
var compatTables = func() map[uint8]map[string][]NFTChain {
	chain := func(name string, hook uint8, typ string, priority int32) NFTChain {
		return NFTChain{Name: name, Hook: hook, Type: typ, Priority: priority}
	}
	ip := map[string][]NFTChain{
		"filter": {chain("INPUT", 1, "filter", 0), chain("FORWARD", 2, "filter", 0), chain("OUTPUT", 3, "filter", 0)},
		"raw":    {chain("PREROUTING", 0, "filter", -300), chain("OUTPUT", 3, "filter", -300)},
		// 150 in the programs, whose comment says NF_IP_PRI_SECURITY, which is 50.
		"security": {
			chain("INPUT", 1, "filter", 150), chain("FORWARD", 2, "filter", 150), chain("OUTPUT", 3, "filter", 150),
			chain("INPUT", 1, "filter", 50), chain("FORWARD", 2, "filter", 50), chain("OUTPUT", 3, "filter", 50),
		},
		"mangle": {
			chain("PREROUTING", 0, "filter", -150), chain("INPUT", 1, "filter", -150), chain("FORWARD", 2, "filter", -150),
			chain("OUTPUT", 3, "route", -150), chain("POSTROUTING", 4, "filter", -150),
		},
		"nat": {
			chain("PREROUTING", 0, "nat", -100), chain("INPUT", 1, "nat", 100),
			chain("OUTPUT", 3, "nat", -100), chain("POSTROUTING", 4, "nat", 100),
		},
	}
	const brFirst = -1 << 31 // NF_BR_PRI_FIRST
	return map[uint8]map[string][]NFTChain{
		unix.NFPROTO_IPV4: ip,
		unix.NFPROTO_IPV6: ip,
		unix.NFPROTO_ARP:  {"filter": {chain("INPUT", 0, "filter", 0), chain("OUTPUT", 1, "filter", 0)}},
		unix.NFPROTO_BRIDGE: {
			"filter": {chain("INPUT", 1, "filter", -200), chain("FORWARD", 2, "filter", -200), chain("OUTPUT", 3, "filter", -200)},
			"nat":    {chain("PREROUTING", 0, "filter", -300), chain("OUTPUT", 3, "filter", 100), chain("POSTROUTING", 4, "filter", 300)},
			"broute": {chain("BROUTING", 0, "filter", brFirst)},
		},
	}
}()

// compat applies the rule of NFTTable.Compat.
func (t *NFTTable) compat() bool {
	bases := 0
	for _, c := range t.Chains {
		if !c.Base {
			continue
		}
		bases++
		known := false
		for _, k := range compatTables[t.Family][t.Name] {
			known = known || k.Name == c.Name && k.Hook == c.Hook && k.Type == c.Type && k.Priority == c.Priority
		}
		if !known {
			return false
		}
	}
	return bases > 0
}

// Table finds a table by its handle; nil for none.
func (r *NFTRuleset) Table(handle uint64) *NFTTable { return r.tables[handle] }

// Chain finds a chain by its table's handle and its own; nil for none.
func (r *NFTRuleset) Chain(table, chain uint64) *NFTChain {
	if t := r.tables[table]; t != nil {
		return t.chains[chain]
	}
	return nil
}

// Rule finds a rule by its table's handle and its own; nil for none. No other
// rule of the table ever had or will have the handle.
func (r *NFTRuleset) Rule(table, rule uint64) *NFTRule {
	if t := r.tables[table]; t != nil {
		return t.rules[rule]
	}
	return nil
}

// nftKernel asks nf_tables and returns the answer: netlink.Conn.Execute.
type nftKernel func(netlink.Message) ([]netlink.Message, error)

// ReadNFT reads all tables, chains and rules of a namespace, all of one
// generation; it fails where they changed each time that it read them. Where
// the kernel has no nf_tables, or has not loaded the module, the ruleset is
// empty: asking would load it.
//
// The kernel counts the generation up before the rules are in force; idle tells whether no
// change is under way, in the namespace, as far as somebody can tell: nil says that it is so.
func ReadNFT(ns *Namespace, idle func() (bool, error)) (*NFTRuleset, error) {
	if !ns.sys.hasModule("nf_tables") {
		return NewNFTRuleset(0, nil), nil
	}
	var r *NFTRuleset
	err := ns.netlink(unix.NETLINK_NETFILTER, func(c *netlink.Conn) error {
		m, gen, err := readNFT(c.Execute, idle)
		if err == nil {
			r, err = m.ruleset(gen)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("nf_tables of net:[%d]: %w", ns.Inode, err)
	}
	return r, nil
}

// errNFTChanged: there was no time in which the ruleset held still.
var errNFTChanged = errors.New("the ruleset changed whenever it was read")

// nftReads is how often a ruleset that changes is read.
const nftReads = 8

// nftWaits is how many milliseconds a change may be under way, transactions being prepared
// included.
const nftWaits = 1000

// readNFT returns what a namespace holds, and the generation that it is.
func readNFT(ask nftKernel, idle func() (bool, error)) (*nftModel, uint32, error) {
	for tries := 0; tries < nftReads; tries++ {
		gen, err := nftGen(ask)
		if err != nil {
			return nil, 0, err
		}
		for waits := 0; idle != nil; waits++ {
			ok, err := idle()
			if err != nil {
				return nil, 0, err
			}
			if ok {
				break
			}
			if waits == nftWaits {
				return nil, 0, errNFTChanged
			}
			time.Sleep(time.Millisecond)
			if gen, err = nftGen(ask); err != nil {
				return nil, 0, err
			}
		}
		m, err := dumpNFT(ask)
		if errors.Is(err, errNFTChanged) {
			continue
		}
		after, afterErr := nftGen(ask)
		if afterErr != nil {
			return nil, 0, afterErr
		}
		// What was read across a change may not fit together; that is no error.
		if after == gen {
			return m, gen, err
		}
	}
	return nil, 0, errNFTChanged
}

func nftRequest(msg uint16, flags netlink.HeaderFlags) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: nftType(msg), Flags: netlink.Request | flags},
		Data:   make([]byte, nfgenmsg), // NFPROTO_UNSPEC: all families
	}
}

func nftType(msg uint16) netlink.HeaderType {
	return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg)
}

// nfgenmsg is the size of struct nfgenmsg; its first byte is the family.
const nfgenmsg = 4

// nftGen asks for the generation.
func nftGen(ask nftKernel) (uint32, error) {
	msgs, err := ask(nftRequest(unix.NFT_MSG_GETGEN, 0))
	if err != nil {
		return 0, fmt.Errorf("generation: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Type == nftType(unix.NFT_MSG_NEWGEN) {
			return parseNFTGen(m.Data)
		}
	}
	return 0, errors.New("generation: no answer")
}

func parseNFTGen(b []byte) (gen uint32, err error) {
	err = nftAttrs(b, func(ad *netlink.AttributeDecoder) {
		if ad.Type() == unix.NFTA_GEN_ID {
			gen = ad.Uint32()
		}
	})
	return gen, err
}

// nftAttrs calls f with each attribute of a message of nf_tables.
func nftAttrs(b []byte, f func(ad *netlink.AttributeDecoder)) error {
	if len(b) < nfgenmsg {
		return errors.New("short nf_tables message")
	}
	ad, err := netlink.NewAttributeDecoder(b[nfgenmsg:])
	if err != nil {
		return fmt.Errorf("nf_tables message: %w", err)
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		f(ad)
	}
	if err := ad.Err(); err != nil {
		return fmt.Errorf("nf_tables message: %w", err)
	}
	return nil
}

// nested calls f with each attribute inside the present one.
func nested(ad *netlink.AttributeDecoder, f func(ad *netlink.AttributeDecoder)) {
	ad.Nested(func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			f(ad)
		}
		return nil
	})
}

// NewNFTRuleset makes a ruleset of tables. What their chains and rules say of where they stand
// (Table, Chain and Num) is set from the tables.
func NewNFTRuleset(gen uint32, tables []*NFTTable) *NFTRuleset {
	for _, t := range tables {
		t.index()
	}
	return newNFTRuleset(gen, tables)
}

func newNFTRuleset(gen uint32, tables []*NFTTable) *NFTRuleset {
	r := &NFTRuleset{Gen: gen, Tables: tables, tables: map[uint64]*NFTTable{}}
	for _, t := range tables {
		r.tables[t.Handle] = t
		for _, rule := range t.rules {
			r.SetsConn = r.SetsConn || rule.setsConn
		}
	}
	return r
}

// index sets what chains and rules say of where they stand, and makes them be found.
func (t *NFTTable) index() {
	t.chains, t.rules = map[uint64]*NFTChain{}, map[uint64]*NFTRule{}
	for _, c := range t.Chains {
		c.Table = t
		t.chains[c.Handle] = c
		for i, rule := range c.Rules {
			rule.Chain, rule.Num = c, i+1
			t.rules[rule.Handle] = rule
		}
	}
}

// dumpNFT reads what a namespace holds while that holds still.
func dumpNFT(ask nftKernel) (*nftModel, error) {
	m := &nftModel{}
	for _, d := range []struct {
		get, answer uint16
		f           func([]byte) error
	}{
		{unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, m.newTable},
		{unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, m.newChain},
		{unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE, m.listRule},
	} {
		if err := nftDump(ask, d.get, d.answer, d.f); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// nftDump calls f with every message of a dump. It wraps errNFTChanged where
// the kernel says that the dump is of more than one generation.
func nftDump(ask nftKernel, get, answer uint16, f func(b []byte) error) error {
	msgs, err := ask(nftRequest(get, netlink.Dump))
	if err != nil {
		return fmt.Errorf("dump: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return errNFTChanged
		}
		if m.Header.Type != nftType(answer) {
			continue
		}
		if err := f(m.Data); err != nil {
			return err
		}
	}
	return nil
}

func parseNFTTable(b []byte) (*NFTTable, error) {
	t := &NFTTable{}
	err := nftAttrs(b, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_TABLE_NAME:
			t.Name = ad.String()
		case nftaTableHandle:
			t.Handle = ad.Uint64()
		}
	})
	if err != nil {
		return nil, err
	}
	t.Family = b[0]
	return t, nil
}

func parseNFTChain(b []byte) (table string, c *NFTChain, err error) {
	c = &NFTChain{}
	err = nftAttrs(b, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			table = ad.String()
		case unix.NFTA_CHAIN_HANDLE:
			c.Handle = ad.Uint64()
		case unix.NFTA_CHAIN_NAME:
			c.Name = ad.String()
		case unix.NFTA_CHAIN_TYPE:
			c.Type = ad.String()
		case unix.NFTA_CHAIN_POLICY:
			c.Policy = int(ad.Uint32())
		case nftaChainFlags:
			c.anonymous = ad.Uint32()&nftChainBinding != 0
		case unix.NFTA_CHAIN_HOOK:
			c.Base = true
			nested(ad, func(ad *netlink.AttributeDecoder) {
				switch ad.Type() {
				case unix.NFTA_HOOK_HOOKNUM:
					c.Hook = uint8(ad.Uint32())
				case unix.NFTA_HOOK_PRIORITY:
					c.Priority = ad.Int32()
				case nftaHookDevs:
					c.devices = true
				}
			})
		}
	})
	return table, c, err
}
