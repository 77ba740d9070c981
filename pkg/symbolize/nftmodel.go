package symbolize

import (
	"container/list"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftModel is what a namespace's nf_tables hold, as the kernel's messages have it: first those of
// a dump, then those of each commit, in their order.
type nftModel struct {
	tables []*nftModelTable

	appended *nftModelChain   // at its end the last message put a rule
	cut      []*nftModelChain // from their ends this commit took rules
}

type nftModelTable struct {
	table   NFTTable                 // but Compat and Chains
	chains  *list.List               // of *nftModelChain
	byName  map[string]*list.Element // of chains
	handles map[uint64]string        // of chains: their names
	rules   map[uint64]*list.Element // of *nftModelRule, by handle
	waiting map[uint64]*nftRuleMsg   // rules of this commit, by the one before them, which is not told of yet

	made *NFTTable // what ruleset made of it, until something changes
}

type nftModelChain struct {
	chain NFTChain   // but Table and Rules
	rules *list.List // of *nftModelRule

	maybeGone bool // a message of this commit says so, or that it lost a device

	// This commit has taken the first rule, the last one. A rule that the commit put behind the
	// one, or before the other, may be yet to come.
	headCut, tailCut bool
	refilled         uint64 // the rule that it then put where none was left
}

type nftModelRule struct {
	chain *nftModelChain
	msg   *nftRuleMsg
	made  *NFTRule // what ruleset made of it; never handed out
	as    bool     // made in a table that was Compat
}

// Messages that x/sys/unix does not have: Linux 6.3 tells so of "destroy" (include/uapi/linux/
// netfilter/nf_tables.h).
const (
	nftMsgDestroyTable = 26
	nftMsgDestroyChain = 27
	nftMsgDestroyRule  = 28
)

var errNFTGap = errors.New("the kernel's notifications do not tell all")

// nftGap is the error where messages were missed, or cannot be understood without another.
func nftGap(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errNFTGap}, args...)...)
}

// apply does what a message says has been done. Messages about other objects change nothing.
func (m *nftModel) apply(msg netlink.Message) error {
	if len(msg.Data) < nfgenmsg {
		return nftGap("a short message")
	}
	appended := m.appended
	m.appended = nil
	switch msg.Header.Type {
	case nftType(unix.NFT_MSG_NEWTABLE):
		return m.newTable(msg.Data)
	case nftType(unix.NFT_MSG_DELTABLE), nftType(nftMsgDestroyTable):
		return m.delTable(msg.Data)
	case nftType(unix.NFT_MSG_NEWCHAIN):
		return m.newChain(msg.Data)
	case nftType(unix.NFT_MSG_DELCHAIN), nftType(nftMsgDestroyChain):
		return m.delChain(msg.Data)
	case nftType(unix.NFT_MSG_NEWRULE):
		return m.newRule(msg)
	case nftType(unix.NFT_MSG_DELRULE), nftType(nftMsgDestroyRule):
		return m.delRule(msg.Data, appended)
	}
	return nil
}

func (m *nftModel) find(family uint8, name string) *nftModelTable {
	for _, t := range m.tables {
		if t.table.Family == family && t.table.Name == name {
			return t
		}
	}
	return nil
}

func (m *nftModel) newTable(b []byte) error {
	t, err := parseNFTTable(b)
	if err != nil {
		return err
	}
	if had := m.find(t.Family, t.Name); had != nil {
		if had.table.Handle != t.Handle {
			return nftGap("a second table %s", t.Name)
		}
		return nil // its flags have changed
	}
	m.tables = append(m.tables, &nftModelTable{
		table: *t, chains: list.New(), byName: map[string]*list.Element{}, handles: map[uint64]string{},
		rules: map[uint64]*list.Element{}, waiting: map[uint64]*nftRuleMsg{},
	})
	return nil
}

func (m *nftModel) delTable(b []byte) error {
	t, err := parseNFTTable(b)
	if err != nil {
		return err
	}
	had := m.find(t.Family, t.Name)
	if had == nil {
		return nftGap("no table %s", t.Name)
	}
	m.tables = slices.DeleteFunc(m.tables, func(t *nftModelTable) bool { return t == had })
	return nil
}

func (m *nftModel) newChain(b []byte) error {
	table, c, err := parseNFTChain(b)
	if err != nil {
		return err
	}
	t := m.find(b[0], table)
	if t == nil {
		return nftGap("chain %s is in no table", c.Name)
	}
	t.made = nil
	if e := t.byName[c.Name]; e != nil {
		had := e.Value.(*nftModelChain)
		if had.chain.Handle == c.Handle {
			had.chain = *c // its policy, for example
			return nil
		}
		if !had.maybeGone {
			return nftGap("a second chain %s", c.Name)
		}
		t.remove(e)
	}
	if old, ok := t.handles[c.Handle]; ok {
		// The rules that jump to it have the old name.
		return nftGap("chain %s is named %s", old, c.Name)
	}
	t.handles[c.Handle] = c.Name
	t.byName[c.Name] = t.chains.PushBack(&nftModelChain{chain: *c, rules: list.New()})
	return nil
}

func (m *nftModel) delChain(b []byte) error {
	table, c, err := parseNFTChain(b)
	if err != nil {
		return err
	}
	t := m.find(b[0], table)
	if t == nil || t.byName[c.Name] == nil {
		return nftGap("no chain %s", c.Name)
	}
	e := t.byName[c.Name]
	if c.devices {
		// Either it has lost these devices (from Linux 6.4 on), or it is gone, on kernels that
		// tell then all that it was: its rules went before, and nobody tells which it is.
		e.Value.(*nftModelChain).maybeGone = true
		t.made = nil
		return nil
	}
	t.remove(e)
	return nil
}

// remove takes a chain away, and the rules that it may have.
func (t *nftModelTable) remove(e *list.Element) {
	c := t.chains.Remove(e).(*nftModelChain)
	for e := c.rules.Front(); e != nil; e = e.Next() {
		delete(t.rules, e.Value.(*nftModelRule).msg.handle)
	}
	delete(t.byName, c.chain.Name)
	delete(t.handles, c.chain.Handle)
	t.made = nil
}

// listRule takes a rule of a dump, which is its chain's last so far.
func (m *nftModel) listRule(b []byte) error {
	t, c, msg, err := m.ruleOf(b)
	if err != nil {
		return err
	}
	t.rules[msg.handle] = c.rules.PushBack(&nftModelRule{chain: c, msg: msg})
	return nil
}

// ruleOf parses a rule that is new, and finds its table and chain.
func (m *nftModel) ruleOf(b []byte) (*nftModelTable, *nftModelChain, *nftRuleMsg, error) {
	msg, err := parseNFTRule(b)
	if err != nil {
		return nil, nil, nil, err
	}
	t := m.find(b[0], msg.table)
	if t == nil || t.byName[msg.chain] == nil {
		return nil, nil, nil, nftGap("rule %d is in no chain", msg.handle)
	}
	if t.rules[msg.handle] != nil {
		return nil, nil, nil, nftGap("a second rule %d", msg.handle)
	}
	t.made = nil
	return t, t.byName[msg.chain].Value.(*nftModelChain), msg, nil
}

// newRule puts a rule where it belongs. net/netfilter/nf_tables_api.c:nf_tables_rule_notify names
// the rule before it but where it is the chain's first or last, and tells by flags how it came
// there; older kernels do neither. The flags do not tell whether it was put behind or before a
// certain rule, which the same commit may have deleted before: __nft_rule_lookup finds such, too.
// That it replaced another the flags tell only if whoever did so did not ask to create it besides:
// then one is deleted in the message before or behind.
func (m *nftModel) newRule(n netlink.Message) error {
	t, c, msg, err := m.ruleOf(n.Data)
	if err != nil {
		return err
	}
	var e *list.Element
	r := &nftModelRule{chain: c, msg: msg}
	switch appended, created := n.Header.Flags&netlink.Append != 0, n.Header.Flags&netlink.Create != 0; {
	case msg.after != 0 && t.rules[msg.after] == nil:
		// One of the same commit that is told of later.
		if t.waiting[msg.after] != nil {
			return nftGap("two rules behind rule %d", msg.after)
		}
		t.waiting[msg.after] = msg
		return nil
	case msg.after != 0:
		return t.putBehind(msg)
	case c.rules.Len() == 0:
		e = c.rules.PushBack(r)
		if c.headCut {
			c.refilled = msg.handle
		}
	case appended && created && !c.headCut:
		e = c.rules.PushBack(r)
		m.appended = c
	case created && !appended && !c.tailCut:
		e = c.rules.PushFront(r)
	default:
		// It replaced the first or the last, or could be either.
		return nftGap("nobody tells where rule %d is", msg.handle)
	}
	t.rules[msg.handle] = e
	return t.putBehind(t.takeWaiting(msg.handle))
}

func (t *nftModelTable) takeWaiting(before uint64) *nftRuleMsg {
	msg := t.waiting[before]
	delete(t.waiting, before)
	return msg
}

// putBehind puts a rule behind the one that it names, and those that wait for it.
func (t *nftModelTable) putBehind(msg *nftRuleMsg) error {
	for ; msg != nil; msg = t.takeWaiting(msg.handle) {
		e := t.rules[msg.after]
		c := e.Value.(*nftModelRule).chain
		if t.rules[msg.handle] != nil {
			return nftGap("a second rule %d", msg.handle)
		}
		if c.chain.Name != msg.chain {
			return nftGap("rule %d is behind one of another chain", msg.handle)
		}
		if msg.after == c.refilled {
			c.headCut = false // that one was not the last, so the first: nothing is to come before it
		}
		t.rules[msg.handle] = c.rules.InsertAfter(&nftModelRule{chain: c, msg: msg}, e)
	}
	return nil
}

func (m *nftModel) delRule(b []byte, appended *nftModelChain) error {
	msg, err := parseNFTRule(b)
	if err != nil {
		return err
	}
	t := m.find(b[0], msg.table)
	if t == nil || t.rules[msg.handle] == nil {
		return nftGap("no rule %d", msg.handle)
	}
	t.made = nil
	e := t.rules[msg.handle]
	r := e.Value.(*nftModelRule)
	if r.chain == appended {
		return nftGap("rule %d may have been replaced", msg.handle)
	}
	if e.Prev() == nil || e.Next() == nil {
		r.chain.headCut = r.chain.headCut || e.Prev() == nil
		r.chain.tailCut = r.chain.tailCut || e.Next() == nil
		m.cut = append(m.cut, r.chain)
	}
	r.chain.rules.Remove(e)
	delete(t.rules, msg.handle)
	// A chain without a name of its own goes with its rule, and nobody tells.
	for i := range r.msg.exprs {
		if c := t.byName[r.msg.exprs[i].chain]; c != nil && c.Value.(*nftModelChain).chain.anonymous {
			t.remove(c)
		}
	}
	return nil
}

// ruleset is what the model holds, as generation gen. Tables that have not changed are shared with
// the rulesets made before.
func (m *nftModel) ruleset(gen uint32) (*NFTRuleset, error) {
	tables := make([]*NFTTable, len(m.tables))
	for i, t := range m.tables {
		if len(t.waiting) > 0 {
			return nil, nftGap("a rule of table %s is behind one that is not there", t.table.Name)
		}
		if t.made == nil {
			var err error
			if t.made, err = t.make(); err != nil {
				return nil, err
			}
		}
		tables[i] = t.made
	}
	return newNFTRuleset(gen, tables), nil
}

func (t *nftModelTable) make() (*NFTTable, error) {
	made := t.table
	for e := t.chains.Front(); e != nil; e = e.Next() {
		had := e.Value.(*nftModelChain)
		if had.maybeGone && had.rules.Len() == 0 {
			return nil, nftGap("chain %s may be gone", had.chain.Name)
		}
		had.maybeGone = false
		c := had.chain
		made.Chains = append(made.Chains, &c)
	}
	made.Compat = made.compat()
	for i, e := 0, t.chains.Front(); e != nil; i, e = i+1, e.Next() {
		from := e.Value.(*nftModelChain).rules
		rules := make([]*NFTRule, 0, from.Len())
		for e := from.Front(); e != nil; e = e.Next() {
			r := e.Value.(*nftModelRule)
			if r.made == nil || r.as != made.Compat {
				r.made, r.as = r.msg.rule(&made), made.Compat
			}
			rule := *r.made
			rules = append(rules, &rule)
		}
		made.Chains[i].Rules = rules
	}
	made.index()
	return &made, nil
}
