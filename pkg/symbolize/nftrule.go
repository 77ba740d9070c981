package symbolize

import (
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftRuleMsg is an NFT_MSG_NEWRULE.
type nftRuleMsg struct {
	table, chain string
	handle       uint64
	after        uint64 // the handle of the rule before it; 0: it is the first or the last, or nobody tells
	ebtPolicy    bool
	exprs        []nftExpr
}

// nftExpr is what nftrace looks at of an expression.
type nftExpr struct {
	name      string
	isVerdict bool   // immediate: a plain verdict; lookup: a verdict map
	verdict   int32  // NF_* or NFT_*
	chain     string // of a jump or goto
	set       string // lookup: the set or map
	not       bool   // lookup: what is in the set does not match
	xt        Match  // match, target: the extension
	writes    bool   // meta, ct, payload, exthdr: sets something
	key       uint32 // meta: NFT_META_*
	base      uint32 // payload: NFT_PAYLOAD_*
	nat       uint32 // nat: NFT_NAT_*
	group     bool   // log: to a group of nfnetlink_log
	object    uint32 // objref: NFT_OBJECT_*
}

func parseNFTRule(b []byte) (*nftRuleMsg, error) {
	m := &nftRuleMsg{}
	err := nftAttrs(b, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_RULE_TABLE:
			m.table = ad.String()
		case unix.NFTA_RULE_CHAIN:
			m.chain = ad.String()
		case unix.NFTA_RULE_HANDLE:
			m.handle = ad.Uint64()
		case unix.NFTA_RULE_POSITION:
			m.after = ad.Uint64()
		case unix.NFTA_RULE_EXPRESSIONS:
			nested(ad, func(ad *netlink.AttributeDecoder) {
				if ad.Type() == unix.NFTA_LIST_ELEM {
					m.exprs = append(m.exprs, parseNFTExpr(ad))
				}
			})
		case unix.NFTA_RULE_USERDATA:
			// libnftnl's own attributes: a byte type, a byte length, the value.
			for u := ad.Bytes(); len(u) >= 2 && len(u)-2 >= int(u[1]); u = u[2+int(u[1]):] {
				if u[0] == udataEbtablesPolicy && u[1] == 4 && u[2] != 0 {
					m.ebtPolicy = b[0] == unix.NFPROTO_BRIDGE
				}
			}
		}
	})
	return m, err
}

func parseNFTExpr(ad *netlink.AttributeDecoder) (e nftExpr) {
	nested(ad, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			e.name = ad.String()
		case unix.NFTA_EXPR_DATA:
			// The kernel sends the name first: it tells what the numbers mean.
			nested(ad, e.attribute)
		}
	})
	return e
}

func (e *nftExpr) attribute(ad *netlink.AttributeDecoder) {
	type attr struct {
		expr string
		num  uint16
	}
	switch (attr{e.name, ad.Type()}) {
	case attr{"immediate", unix.NFTA_IMMEDIATE_DATA}:
		nested(ad, func(ad *netlink.AttributeDecoder) {
			if ad.Type() != unix.NFTA_DATA_VERDICT {
				return
			}
			e.isVerdict = true
			nested(ad, func(ad *netlink.AttributeDecoder) {
				switch ad.Type() {
				case unix.NFTA_VERDICT_CODE:
					e.verdict = ad.Int32()
				case unix.NFTA_VERDICT_CHAIN:
					e.chain = ad.String()
				}
			})
		})
	case attr{"lookup", unix.NFTA_LOOKUP_SET}:
		e.set = ad.String()
	case attr{"lookup", unix.NFTA_LOOKUP_DREG}:
		e.isVerdict = ad.Uint32() == unix.NFT_REG_VERDICT
	case attr{"lookup", unix.NFTA_LOOKUP_FLAGS}:
		e.not = ad.Uint32()&unix.NFT_LOOKUP_F_INV != 0
	case attr{"match", unix.NFTA_MATCH_NAME}, attr{"target", unix.NFTA_TARGET_NAME}:
		e.xt.Name = ad.String()
	case attr{"match", unix.NFTA_MATCH_REV}, attr{"target", unix.NFTA_TARGET_REV}:
		e.xt.Revision = uint8(ad.Uint32())
	case attr{"match", unix.NFTA_MATCH_INFO}, attr{"target", unix.NFTA_TARGET_INFO}:
		e.xt.Data = ad.Bytes()
	case attr{"meta", unix.NFTA_META_SREG}, attr{"ct", unix.NFTA_CT_SREG},
		attr{"payload", unix.NFTA_PAYLOAD_SREG}, attr{"exthdr", unix.NFTA_EXTHDR_SREG}:
		e.writes = true
	case attr{"meta", unix.NFTA_META_KEY}:
		e.key = ad.Uint32()
	case attr{"payload", unix.NFTA_PAYLOAD_BASE}:
		e.base = ad.Uint32()
	case attr{"nat", unix.NFTA_NAT_TYPE}:
		e.nat = ad.Uint32()
	case attr{"log", unix.NFTA_LOG_GROUP}:
		e.group = true
	case attr{"objref", unix.NFTA_OBJREF_IMM_TYPE}:
		e.object = ad.Uint32()
	}
}

// statement names what e does to the packet beyond a plain verdict, as nft
// does or, compat, as iptables does; "" for nothing.
func (e *nftExpr) statement(compat bool) string {
	name := ""
	switch e.name {
	case "target":
		return e.xt.Name
	case "meta":
		if compat && e.writes && e.key == unix.NFT_META_NFTRACE {
			return "TRACE"
		}
		return ""
	case "log":
		if compat && e.group {
			return "NFLOG"
		}
		name = e.name
	case "reject", "queue", "fwd", "dup", "notrack", "tproxy", "synproxy":
		name = e.name
	case "masq":
		name = "masquerade"
	case "redir":
		name = "redirect"
	case "nat":
		name = "dnat"
		if e.nat == unix.NFT_NAT_SNAT {
			name = "snat"
		}
	}
	if compat {
		name = strings.ToUpper(name)
	}
	return name
}

// harmless reports that e is no match, no verdict and no statement. A comment is a match to
// xtables (net/ipv4/netfilter/ip_tables.c:unconditional).
func (e *nftExpr) harmless() bool {
	switch e.name {
	case "counter", "last", "immediate":
		return true
	case "meta", "ct", "payload", "exthdr":
		return e.writes
	case "objref":
		return e.object == unix.NFT_OBJECT_COUNTER
	}
	return false
}

// setsConn reports that e may set the mark of a connection.
func (e *nftExpr) setsConn() bool {
	switch e.name {
	case "ct":
		return e.writes
	case "target":
		name := e.xt.Name
		known := leavesPacket[name] || leavesMarks[name] || targetEnd[name] != 0
		return name == "CONNMARK" || !known
	}
	return false
}

// foreign reports that iptables-nft and its like did not write the rule: those
// put a counter into every rule, and know few expressions
// (iptables/nft.c:supported_exprs). Their save programs leave out what else
// a rule has, or take it for something else.
func (m *nftRuleMsg) foreign(family uint8) bool {
	counted := false
	for i := range m.exprs {
		switch e := &m.exprs[i]; e.name {
		case "counter":
			counted = true
		case "match", "target", "payload", "meta", "cmp", "bitwise", "immediate", "limit", "range":
		case "lookup":
			if family != unix.NFPROTO_BRIDGE || e.isVerdict {
				return true
			}
		case "log":
			if !e.group {
				return true
			}
		default:
			return true
		}
	}
	return !counted
}

// xtModule names the kernel module that a save program asks for, and so loads,
// to print e as an option of an extension; "" for none. (For those of match
// and target expressions the module is there.)
func (e *nftExpr) xtModule() string {
	const transport = 2 // NFT_PAYLOAD_TRANSPORT_HEADER
	switch {
	case e.name == "payload" && e.base == transport, e.name == "range":
		return "xt_tcpudp"
	case e.name == "limit":
		return "xt_limit"
	case e.name == "log":
		return "xt_NFLOG"
	case e.name == "meta" && e.key == unix.NFT_META_MARK:
		return "xt_mark"
	case e.name == "meta" && e.key == unix.NFT_META_PKTTYPE:
		return "xt_pkttype"
	case e.name == "meta" && e.key == unix.NFT_META_NFTRACE:
		return "xt_TRACE"
	}
	return ""
}

// rule makes of the message what NFTRule has of it.
func (m *nftRuleMsg) rule(t *NFTTable) *NFTRule {
	r := &NFTRule{Handle: m.handle, Unconditional: true, verdict: unix.NFT_CONTINUE}
	for i := range m.exprs {
		e := &m.exprs[i]
		switch s := e.statement(t.Compat); {
		case s != "":
			r.Target = s
		case e.isVerdict:
			r.Target = ""
			if e.name == "immediate" {
				r.verdict, r.dest = e.verdict, e.chain
			}
		}
		if e.statement(t.Compat) == "" && !e.harmless() {
			r.Unconditional = false
		}
	}
	r.ChainPolicy = m.ebtPolicy && t.Compat
	r.native = m.text(t)
	r.foreign = m.foreign(t.Family)
	for i := range m.exprs {
		e := &m.exprs[i]
		if x := e.xtModule(); x != "" {
			r.modules = append(r.modules, x)
		}
		r.setsConn = r.setsConn || e.setsConn()
	}
	return r
}

// text renders the rule from its expressions. Conditions and values are mostly
// left to their expressions' names, in brackets: "[meta cmp] counter accept",
// in Compat tables "[meta cmp] -m conntrack --ctstate NEW -j ACCEPT".
func (m *nftRuleMsg) text(t *NFTTable) string {
	family := IPv4
	if t.Family == unix.NFPROTO_IPV6 {
		family = IPv6
	}
	var w, other []string
	say := func(s string) {
		if len(other) > 0 {
			w = append(w, "["+strings.Join(other, " ")+"]")
			other = nil
		}
		w = append(w, s)
	}
	for i := range m.exprs {
		e := &m.exprs[i]
		switch {
		case e.name == "counter" && t.Compat:
		case e.name == "counter":
			say("counter")
		case e.name == "immediate" && e.isVerdict:
			say(nftVerdictText(t.Compat, e.verdict, e.chain))
		case e.name == "lookup" && e.isVerdict:
			other = append(other, "vmap @"+e.set)
		case e.name == "lookup" && e.not:
			other = append(other, "lookup != @"+e.set)
		case e.name == "lookup":
			other = append(other, "lookup @"+e.set)
		case e.name == "match" && t.Compat:
			name, opts, ok := matchText(&e.xt, family)
			say(extensionText("-m", name, opts, ok))
		case e.name == "target" && t.Compat:
			opts, ok := (&Table{Family: family}).targetText(&Entry{Target: e.xt.Name, Revision: e.xt.Revision, Data: e.xt.Data})
			say(extensionText("-j", e.xt.Name, opts, ok))
		case e.name == "match" || e.name == "target":
			say("xt " + e.name + " " + e.xt.Name)
		case e.statement(t.Compat) != "" && t.Compat:
			say(extensionText("-j", e.statement(true), "", false))
		case e.statement(t.Compat) != "":
			say(e.statement(false))
		case e.writes:
			other = append(other, e.name+" set")
		default:
			other = append(other, e.name)
		}
	}
	if len(other) > 0 {
		say("")
	}
	return oneLine(strings.TrimSpace(strings.Join(w, " ")))
}

func nftVerdictText(compat bool, verdict int32, chain string) string {
	var name string
	switch verdict {
	case unix.NFT_CONTINUE:
		name = "CONTINUE"
	case unix.NFT_BREAK:
		name = "BREAK"
	case unix.NFT_RETURN:
		name = "RETURN"
	case unix.NFT_JUMP, unix.NFT_GOTO:
		flag, word := "-j ", "jump "
		if verdict == unix.NFT_GOTO {
			flag, word = "-g ", "goto "
		}
		if compat {
			return flag + chain
		}
		return word + chain
	default:
		name = verdictName(uint32(verdict))
	}
	if compat {
		return "-j " + name
	}
	return strings.ToLower(name)
}

// fits compares the rule's verdict or target with the -j or -g of its text.
func (r *NFTRule) fits(words []string) error {
	flag, want := "-j", r.Target
	if want == "" {
		switch r.verdict {
		case unix.NFT_CONTINUE:
			return nil
		case unix.NFT_RETURN:
			want = "RETURN"
		case unix.NFT_JUMP:
			want = r.dest
		case unix.NFT_GOTO:
			flag, want = "-g", r.dest
		default:
			want = verdictName(uint32(r.verdict))
		}
	}
	for k := 0; k+1 < len(words); k++ {
		if words[k] == flag && (words[k+1] == want || want == "CT" && words[k+1] == "NOTRACK") {
			return nil
		}
	}
	return fmt.Errorf("%s:%d has no %s %s", r.Chain.Name, r.Num, flag, want)
}
