package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// NumEBTHooks is NF_BR_NUMHOOKS.
const NumEBTHooks = 6

// EBTBrouting is NF_BR_BROUTING; the other hooks are numbered as IP's.
const EBTBrouting = 5

// ebtHookNames mirrors net/bridge/netfilter/ebtables.c: how ebtables calls built-in chains.
var ebtHookNames = [NumEBTHooks]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "BROUTING"}

// EBTVerdict is what ebtables decides (include/uapi/linux/netfilter_bridge/ebtables.h);
// from 0 on it is a jump.
type EBTVerdict int32

// The verdicts.
const (
	EBTAccept   EBTVerdict = -1
	EBTDrop     EBTVerdict = -2
	EBTContinue EBTVerdict = -3
	EBTReturn   EBTVerdict = -4
)

func (v EBTVerdict) String() string {
	switch v {
	case EBTAccept:
		return "ACCEPT"
	case EBTDrop:
		return "DROP"
	case EBTContinue:
		return "CONTINUE"
	case EBTReturn:
		return "RETURN"
	}
	return fmt.Sprintf("verdict %d", int32(v))
}

// EBTRule is one rule, an ebt_entry.
type EBTRule struct {
	Chain *EBTChain
	Num   int // position in its chain, from 1
	Index int // of its counter in the table

	Target string // "standard", or the extension's name
	// Verdicts are what the target can decide, the likeliest first. It is empty for an
	// extension that nftrace does not know.
	Verdicts []EBTVerdict
	Dest     *EBTChain // of a jump, which has no Verdicts
	// Always is set where nothing is asked of the packet.
	Always bool

	conditions ebtConditions
	set        *ebtSet // of target mark
	text       string
}

// Modifies tells whether the target may change the packet.
func (r *EBTRule) Modifies() bool { return r.Target != ebtStandard && r.Target != "arpreply" }

// Text renders the rule much as ebtables -L prints it. What it has no words for is "…" behind
// the extension's name.
func (r *EBTRule) Text() string { return r.text }

// EBTChain is one chain, an ebt_entries.
type EBTChain struct {
	Name   string
	Hook   int // of a built-in chain; -1 for others
	Policy EBTVerdict
	Rules  []*EBTRule

	count int // of its rules, as its head has it
}

// EBTTable is one table of ebtables as the kernel holds it.
type EBTTable struct {
	Name   string
	Chains []*EBTChain // built-in ones first, in the order of their hooks
	Rules  []*EBTRule  // of all chains, by Index
}

// ebtInfo is what EBT_SO_GET_INFO says of a table.
type ebtInfo struct{ validHooks, entries, size uint32 }

const (
	ebtStandard   = "standard"
	ebtHeadSize   = 48  // struct ebt_entries
	ebtEntrySize  = 112 // struct ebt_entry up to elems
	ebtExtHead    = 40  // struct ebt_entry_match, _watcher, _target up to data
	ebtNameSize   = 32  // EBT_TABLE_MAXNAMELEN, EBT_CHAIN_MAXNAMELEN
	ebtFlagEntry  = 0x01
	ebtFlagNoProt = 0x02
	ebtFlag8023   = 0x04
	ebtFlagSrc    = 0x08
	ebtFlagDst    = 0x10

	ebtInvProto = 0x01
	ebtInvIn    = 0x02
	ebtInvOut   = 0x04
	ebtInvSrc   = 0x08
	ebtInvDst   = 0x10
	ebtInvLogIn = 0x20
	ebtInvLogOu = 0x40
)

// parseEBT reads a table's entries: blob is what EBT_SO_GET_ENTRIES gives and info what
// EBT_SO_GET_INFO said of the same table. It mirrors ebt_verify_pointers and translate_table,
// and refuses what they do. Byte order is the machine's.
func parseEBT(name string, info ebtInfo, blob []byte) (*EBTTable, error) {
	t := &EBTTable{Name: name}
	if err := t.parse(info, blob); err != nil {
		return nil, fmt.Errorf("ebtables table %q: %w: %w", name, ErrBlob, err)
	}
	return t, nil
}

func (t *EBTTable) parse(info ebtInfo, blob []byte) error {
	if int64(info.size) != int64(len(blob)) {
		return fmt.Errorf("size %d, but %d bytes of entries", info.size, len(blob))
	}
	if info.validHooks == 0 || info.validHooks>>NumEBTHooks != 0 {
		return fmt.Errorf("hooks %#x", info.validHooks)
	}
	hooks := info.validHooks
	var chain *EBTChain
	users := map[int]*EBTChain{} // by where they are
	jumps := map[*EBTRule]int{}
	for off := 0; off < len(blob); {
		b := blob[off:]
		if len(b) < 4 {
			return fmt.Errorf("%d bytes at %d", len(b), off)
		}
		if binary.NativeEndian.Uint32(b) == 0 {
			if len(b) < ebtHeadSize {
				return fmt.Errorf("head of a chain at %d: %d bytes", off, len(b))
			}
			if err := chain.full(); err != nil {
				return err
			}
			u := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
			chain = &EBTChain{
				Name: cString(b[4 : 4+ebtNameSize]), Hook: -1, Policy: EBTVerdict(int32(u(40))), count: int(u(44)),
			}
			if int64(u(36)) != int64(len(t.Rules)) {
				return fmt.Errorf("counters of chain %q begin at %d, not %d", chain.Name, u(36), len(t.Rules))
			}
			if hooks != 0 {
				chain.Hook = bits.TrailingZeros32(hooks)
				hooks &= hooks - 1
				chain.Name = ebtHookNames[chain.Hook]
			} else {
				users[off] = chain
			}
			if p := chain.Policy; p != EBTAccept && p != EBTDrop && (p != EBTReturn || chain.Hook >= 0) {
				return fmt.Errorf("policy %d of chain %q", int32(p), chain.Name)
			}
			t.Chains = append(t.Chains, chain)
			off += ebtHeadSize
			continue
		}
		if chain == nil {
			return errors.New("a rule before any chain")
		}
		r, jump, size, err := parseEBTRule(b)
		if err != nil {
			return fmt.Errorf("rule at %d: %w", off, err)
		}
		r.Chain, r.Num, r.Index = chain, len(chain.Rules)+1, len(t.Rules)
		chain.Rules = append(chain.Rules, r)
		t.Rules = append(t.Rules, r)
		if jump >= 0 {
			jumps[r] = jump
		}
		off += size
	}
	if err := chain.full(); err != nil {
		return err
	}
	if hooks != 0 {
		return fmt.Errorf("hooks %#x have no chain", hooks)
	}
	if int64(info.entries) != int64(len(t.Rules)) {
		return fmt.Errorf("%d rules, but %d were read", info.entries, len(t.Rules))
	}
	for r, to := range jumps {
		// The kernel does not look at those in chains that nothing leads to.
		if c := users[to]; c != nil {
			r.Dest = c
			r.text += c.Name
		}
	}
	for _, r := range t.Rules {
		r.text = oneLine(r.text)
	}
	return nil
}

// full tells whether a chain, if it is one, has the rules that it says.
func (c *EBTChain) full() error {
	if c != nil && c.count != len(c.Rules) {
		return fmt.Errorf("chain %q has %d rules, not %d", c.Name, len(c.Rules), c.count)
	}
	return nil
}

// parseEBTRule reads a struct ebt_entry from the start of b. jump is where it jumps to, -1 if
// it does not.
func parseEBTRule(b []byte) (r *EBTRule, jump, size int, err error) {
	if len(b) < ebtEntrySize {
		return nil, 0, 0, fmt.Errorf("%d bytes are left, fewer than any rule has", len(b))
	}
	u := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
	watchers, target, next := u(100), u(104), u(108)
	switch {
	case next > uint32(len(b)):
		return nil, 0, 0, fmt.Errorf("%d bytes long, %d are left", next, len(b))
	case watchers < ebtEntrySize || watchers > target || target > next || next-target < ebtExtHead:
		return nil, 0, 0, fmt.Errorf("watchers at %d, target at %d, of %d bytes", watchers, target, next)
	}
	t := &ebtText{}
	conditions := t.header(b)
	r = &EBTRule{}
	r.conditions.addHeader(b, conditions)
	for i, part := range [][]byte{b[ebtEntrySize:watchers], b[watchers:target]} {
		for len(part) > 0 {
			name, data, n, err := parseEBTExtension(part)
			if err != nil {
				return nil, 0, 0, err
			}
			t.extension(name, data)
			if i == 0 {
				r.conditions.add(name, data)
			}
			part = part[n:]
		}
	}
	name, data, _, err := parseEBTExtension(b[target:next])
	if err != nil {
		return nil, 0, 0, fmt.Errorf("target: %w", err)
	}
	r.Target, r.Always = name, !conditions && watchers == ebtEntrySize
	if name == "mark" && len(data) >= 12 {
		r.set = &ebtSet{binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint32(data[8:]) & 0xf0}
	}
	jump = -1
	if name == ebtStandard {
		if len(data) < 4 {
			return nil, 0, 0, fmt.Errorf("standard target of %d bytes", len(data))
		}
		v := EBTVerdict(int32(binary.NativeEndian.Uint32(data)))
		switch {
		case v >= 0:
			jump = int(v)
			t.add("-j ")
		case v < EBTReturn:
			return nil, 0, 0, fmt.Errorf("verdict %d", int32(v))
		default:
			r.Verdicts = []EBTVerdict{v}
			t.add("-j " + v.String())
		}
	} else {
		r.Verdicts = ebtVerdicts(name, data)
		t.target(name, data)
	}
	r.text = t.String()
	return r, jump, int(next), nil
}

// parseEBTExtension reads a match, watcher or target from the start of b.
func parseEBTExtension(b []byte) (name string, data []byte, size int, err error) {
	if len(b) < ebtExtHead {
		return "", nil, 0, fmt.Errorf("extension of %d bytes", len(b))
	}
	n := int64(binary.NativeEndian.Uint32(b[32:]))
	if name = cString(b[:31]); name == ebtStandard {
		// The size of its data says nothing: the verdict is what is left.
		return name, b[ebtExtHead:], len(b), nil
	}
	if n > int64(len(b)-ebtExtHead) {
		return "", nil, 0, fmt.Errorf("extension %q of %d bytes, %d are left", name, n, len(b)-ebtExtHead)
	}
	size = ebtExtHead + int(n)
	return name, b[ebtExtHead:size], size, nil
}

// ebtVerdicts are what a target can decide (net/bridge/netfilter/ebt_mark.c, ebt_dnat.c,
// ebt_snat.c, ebt_redirect.c, ebt_arpreply.c), first what its rule says.
func ebtVerdicts(name string, data []byte) []EBTVerdict {
	at := func(off int) EBTVerdict {
		if len(data) < off+4 {
			return 0
		}
		return EBTVerdict(int32(binary.NativeEndian.Uint32(data[off:])))
	}
	var v EBTVerdict
	switch name {
	case "mark":
		v = at(8) | ^0xf // EBT_VERDICT_BITS; the others say how it is set
	case "dnat":
		v = at(8)
	case "snat":
		v = at(8) | ^0xf
	case "redirect":
		v = at(0)
	case "arpreply":
		v = at(8)
	default:
		return nil
	}
	if v > EBTAccept || v < EBTReturn {
		return nil
	}
	all := []EBTVerdict{v}
	if name == "arpreply" && v != EBTContinue {
		all = append(all, EBTContinue) // not a request
	}
	if name != "mark" && v != EBTDrop {
		all = append(all, EBTDrop) // the packet could not be read or written
	}
	return all
}
