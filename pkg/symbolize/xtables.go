package symbolize

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
)

// Family is an address family that has xtables tables.
type Family uint8

// The families, numbered as netfilter numbers them (NFPROTO_*).
const (
	IPv4 Family = 2
	ARP  Family = 3
	IPv6 Family = 10
)

func (f Family) String() string {
	switch f {
	case IPv4:
		return "ip"
	case ARP:
		return "arp"
	case IPv6:
		return "ip6"
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// NumHooks is NF_INET_NUMHOOKS, the most that a family has.
const NumHooks = 5

// net/ipv4/netfilter/ip_tables.c:hooknames, and include/uapi/linux/netfilter_arp.h.
var (
	hookNames    = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
	arpHookNames = []string{"INPUT", "OUTPUT", "FORWARD"}
)

// hookNames are the family's hooks, as the built-in chains at them are called.
func (f Family) hookNames() []string {
	if f == ARP {
		return arpHookNames
	}
	return hookNames
}

// Info is struct ipt_getinfo (ip6t_getinfo, arpt_getinfo): what the kernel says of a
// table beside its entries. Offsets are in bytes from the blob's start.
type Info struct {
	ValidHooks uint32
	HookEntry  [NumHooks]uint32
	Underflow  [NumHooks]uint32
	NumEntries uint32
	Size       uint32
}

// TargetKind says what an entry's target does to the run.
type TargetKind uint8

const (
	// TargetExtension is a target of a module: REJECT, MARK, DNAT …
	TargetExtension TargetKind = iota
	// TargetVerdict is a standard target that ends the run: Entry.Verdict.
	TargetVerdict
	// TargetReturn is a standard RETURN.
	TargetReturn
	// TargetJump pushes the entry and goes on at Entry.Dest.
	TargetJump
	// TargetGoto goes on at Entry.Dest.
	TargetGoto
	// TargetNext is a rule without a target: a jump to the next entry.
	TargetNext
	// TargetError is the head of a user chain or the end of the table.
	TargetError
)

// Match is one match extension of a rule, with its data as userspace gave it
// to the kernel. Data shares memory with the blob.
type Match struct {
	Name     string
	Revision uint8
	Data     []byte
}

// Header is struct ipt_ip, ip6t_ip6 or arpt_arp: the conditions that every rule has.
// Addresses and masks have 4 or 16 bytes and share memory with the blob. Of ARP, Src and
// Dst are the sender's and the target's protocol addresses.
type Header struct {
	Src, Dst, SrcMask, DstMask         []byte
	InIface, OutIface                  string // up to the first NUL, as far as the mask reaches
	inIface, outIface, inMask, outMask []byte
	Proto                              uint16
	TOS                                uint8 // IPv6 only; the kernel does not look at it
	Flags, InvFlags                    uint8
	arp                                arpConditions
}

// arpConditions is what struct arpt_arp has besides.
type arpConditions struct {
	hlen, hlenMask                                       uint8
	srcMAC, srcMACMask                                   []byte // 16 bytes each
	dstMAC, dstMACMask                                   []byte
	op, opMask, hwType, hwTypeMask, protoType, protoMask uint16
	inv                                                  uint16 // as in the kernel; InvFlags has four of these bits
}

// Bits of Header.Flags and Header.InvFlags
// (include/uapi/linux/netfilter_ipv{4,6}/ip{,6}_tables.h).
const (
	ip4FlagFrag = 0x01
	ip4FlagGoto = 0x02

	ip6FlagProto = 0x01
	ip6FlagGoto  = 0x04

	invIn    = 0x01
	invOut   = 0x02
	invTOS   = 0x04
	invSrc   = 0x08
	invDst   = 0x10
	invFrag  = 0x20
	invProto = 0x40
)

// Bits of arpConditions.inv (include/uapi/linux/netfilter_arp/arp_tables.h).
const (
	arpInvIn        = 0x0001
	arpInvOut       = 0x0002
	arpInvSrc       = 0x0004
	arpInvDst       = 0x0008
	arpInvSrcMAC    = 0x0010
	arpInvDstMAC    = 0x0020
	arpInvOp        = 0x0040
	arpInvHwType    = 0x0080
	arpInvProtoType = 0x0100
	arpInvHLen      = 0x0200
)

// Entry is one ipt_entry, ip6t_entry or arpt_entry.
type Entry struct {
	Index  int
	Offset int // in bytes from the blob's start, as in the kernel
	// Chain and Num are the chain that the entry belongs to and its position
	// there, from 1; the head of a user chain has Num 0.
	Chain string
	Num   int

	Header  Header
	Matches []Match

	Kind    TargetKind
	Verdict int // NF_*, for TargetVerdict
	Dest    int // index of the entry to go on at, for TargetJump and TargetGoto
	// Target, Revision and Data are the target extension's; for TargetError
	// Target is "ERROR" and Data holds the chain's name, NUL-terminated.
	Target   string
	Revision uint8
	Data     []byte

	// IsPolicy is set for a built-in chain's policy, IsEnd for the RETURN that
	// iptables puts at the end of every user chain.
	IsPolicy, IsEnd bool

	always bool // matches every packet: no conditions at all
	uncond bool // what the kernel calls unconditional(): the same, and no flags
	seg    int32
}

// Table is one table of one network namespace as the kernel holds it.
type Table struct {
	Family     Family
	Name       string
	ValidHooks uint32
	// HookEntry and Underflow are indices into Entries: where a run at the
	// hook starts, and the built-in chain's policy. -1 for hooks that the
	// table does not have.
	HookEntry, Underflow [NumHooks]int
	Entries              []Entry

	nextAlways []int32 // first entry from here on that matches every packet, len(Entries) for none
	segs       int     // number of stretches between chain heads
}

// ErrBlob is what ParseTable's errors wrap.
var ErrBlob = errors.New("not a table as the kernel gives it")

const (
	xtHeaderSize = 32 // struct xt_entry_match, xt_entry_target up to data
	ifNameSize   = 16
	xtReturn     = -5 // XT_RETURN
	errorTarget  = "ERROR"
)

type layout struct {
	family                         Family
	addr, header, size             int // bytes of an address, of ipt_ip, of ipt_entry
	targetOffset, nextOffset       int
	proto, tos, flags, inv, gotoFl int
}

func layoutOf(f Family) (layout, bool) {
	switch f {
	case IPv4:
		return layout{family: f, addr: 4, header: 84, size: 112, targetOffset: 88, nextOffset: 90,
			proto: 80, tos: -1, flags: 82, inv: 83, gotoFl: ip4FlagGoto}, true
	case ARP: // no gotos
		return layout{family: f, addr: 4, header: 164, size: 192, targetOffset: 164, nextOffset: 166, flags: 158}, true
	case IPv6:
		return layout{family: f, addr: 16, header: 136, size: 168, targetOffset: 140, nextOffset: 142,
			proto: 128, tos: 130, flags: 131, inv: 132, gotoFl: ip6FlagGoto}, true
	}
	return layout{}, false
}

// ParseTable reads a table's entries: blob is ipt_get_entries.entrytable
// (ip6t_get_entries, arpt_get_entries likewise) and info what IPT_SO_GET_INFO said of the
// same table. It refuses what the kernel would not hold (jumps between
// entries, hooks outside the blob …). The table keeps and shares blob.
// Byte order is the machine's.
func ParseTable(family Family, name string, info Info, blob []byte) (*Table, error) {
	l, ok := layoutOf(family)
	if !ok {
		return nil, fmt.Errorf("table %q: %w: %v has no xtables", name, ErrBlob, family)
	}
	t := &Table{Family: family, Name: name, ValidHooks: info.ValidHooks}
	if err := t.parse(l, info, blob); err != nil {
		return nil, fmt.Errorf("%v table %q: %w: %w", family, name, ErrBlob, err)
	}
	return t, nil
}

func (t *Table) parse(l layout, info Info, blob []byte) error {
	if int64(info.Size) != int64(len(blob)) {
		return fmt.Errorf("size %d, but %d bytes of entries", info.Size, len(blob))
	}
	names := t.Family.hookNames()
	if info.ValidHooks>>len(names) != 0 {
		return fmt.Errorf("unknown hooks %#x", info.ValidHooks)
	}
	// The number of entries is the kernel's word, not yet checked: an entry has
	// at least l.size+xtHeaderSize bytes.
	t.Entries = make([]Entry, 0, len(blob)/(l.size+xtHeaderSize))
	for off := 0; off < len(blob); {
		e, size, err := parseEntry(l, blob[off:])
		if err != nil {
			return fmt.Errorf("entry %d at %d: %w", len(t.Entries), off, err)
		}
		e.Index, e.Offset = len(t.Entries), off
		t.Entries = append(t.Entries, e)
		off += size
	}
	if int64(info.NumEntries) != int64(len(t.Entries)) {
		return fmt.Errorf("%d entries, but %d were read", info.NumEntries, len(t.Entries))
	}
	var ok bool
	for h := range NumHooks {
		t.HookEntry[h], t.Underflow[h] = -1, -1
		if info.ValidHooks&(1<<h) == 0 {
			continue
		}
		if t.HookEntry[h], ok = t.indexAt(int64(info.HookEntry[h])); !ok {
			return fmt.Errorf("hook %s starts at %d, which is no entry", names[h], info.HookEntry[h])
		}
		if t.Underflow[h], ok = t.indexAt(int64(info.Underflow[h])); !ok {
			return fmt.Errorf("the policy of %s is at %d, which is no entry", names[h], info.Underflow[h])
		}
		t.Entries[t.Underflow[h]].IsPolicy = true
	}
	for i := range t.Entries {
		e := &t.Entries[i]
		if e.Kind != TargetJump && e.Kind != TargetGoto {
			continue
		}
		// Dest still holds the offset that the verdict named.
		to, ok := t.indexAt(int64(e.Dest))
		if !ok {
			return fmt.Errorf("entry %d jumps to %d, which is no entry", i, e.Dest)
		}
		e.Dest = to
		if to == i+1 {
			// As ipt_do_table has it, whatever the goto flag says.
			e.Kind = TargetNext
		}
	}
	t.name()
	return nil
}

func parseEntry(l layout, b []byte) (Entry, int, error) {
	var e Entry
	if len(b) < l.size+xtHeaderSize {
		return e, 0, fmt.Errorf("%d bytes are left, fewer than any entry has", len(b))
	}
	targetOff := int(binary.NativeEndian.Uint16(b[l.targetOffset:]))
	next := int(binary.NativeEndian.Uint16(b[l.nextOffset:]))
	switch {
	case next > len(b):
		return e, 0, fmt.Errorf("%d bytes long, %d are left", next, len(b))
	case targetOff < l.size || targetOff+xtHeaderSize > next:
		return e, 0, fmt.Errorf("target at %d of %d bytes", targetOff, next)
	}
	e.Header = parseHeader(l, b)

	for off := l.size; off < targetOff; {
		name, rev, data, size, err := parseExtension(b[off:targetOff])
		if err != nil {
			return e, 0, fmt.Errorf("match at %d: %w", off, err)
		}
		e.Matches = append(e.Matches, Match{Name: name, Revision: rev, Data: data})
		off += size
	}

	name, rev, data, _, err := parseExtension(b[targetOff:next])
	if err != nil {
		return e, 0, fmt.Errorf("target: %w", err)
	}
	e.Target, e.Revision, e.Data = name, rev, data
	switch name {
	case errorTarget:
		e.Kind = TargetError
	case "":
		if len(data) < 4 {
			return e, 0, fmt.Errorf("standard target of %d bytes", len(data))
		}
		v := int(int32(binary.NativeEndian.Uint32(data)))
		switch {
		case v == xtReturn:
			e.Kind = TargetReturn
		case v < 0:
			e.Kind, e.Verdict = TargetVerdict, -v-1
		case int(e.Header.Flags)&l.gotoFl != 0:
			e.Kind, e.Dest = TargetGoto, v
		default:
			e.Kind, e.Dest = TargetJump, v
		}
	}

	zero := true // as unconditional() looks at it
	for _, c := range b[:l.header] {
		zero = zero && c == 0
	}
	e.uncond = zero && targetOff == l.size
	e.always = len(e.Matches) == 0 && e.Header.matchesAll(l)
	return e, next, nil
}

// parseExtension reads a struct xt_entry_match or xt_entry_target in its user
// form from the start of b.
func parseExtension(b []byte) (name string, rev uint8, data []byte, size int, err error) {
	if len(b) < xtHeaderSize {
		return "", 0, nil, 0, fmt.Errorf("%d bytes are left", len(b))
	}
	size = int(binary.NativeEndian.Uint16(b))
	if size < xtHeaderSize || size > len(b) {
		return "", 0, nil, 0, fmt.Errorf("%d bytes long, %d are left", size, len(b))
	}
	return cString(b[2:31]), b[31], b[xtHeaderSize:size:size], size, nil
}

func parseHeader(l layout, b []byte) Header {
	if l.family == ARP {
		return parseARPHeader(l, b)
	}
	a := l.addr
	h := Header{
		Src: b[0:a:a], Dst: b[a : 2*a : 2*a],
		SrcMask: b[2*a : 3*a : 3*a], DstMask: b[3*a : 4*a : 4*a],
	}
	b = b[4*a:]
	h.inIface, h.outIface = b[0:16:16], b[16:32:32]
	h.inMask, h.outMask = b[32:48:48], b[48:64:64]
	h.InIface, h.OutIface = ifaceName(h.inIface, h.inMask), ifaceName(h.outIface, h.outMask)
	h.Proto = binary.NativeEndian.Uint16(b[l.proto-4*a:])
	if l.tos >= 0 {
		h.TOS = b[l.tos-4*a]
	}
	h.Flags, h.InvFlags = b[l.flags-4*a], b[l.inv-4*a]
	return h
}

// parseARPHeader reads struct arpt_arp (include/uapi/linux/netfilter_arp/arp_tables.h).
func parseARPHeader(l layout, b []byte) Header {
	u16 := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	part := func(from, n int) []byte { return b[from : from+n : from+n] }
	h := Header{
		Src: part(0, 4), Dst: part(4, 4), SrcMask: part(8, 4), DstMask: part(12, 4),
		inIface: part(94, 16), outIface: part(110, 16), inMask: part(126, 16), outMask: part(142, 16),
		Flags: b[l.flags],
	}
	h.InIface, h.OutIface = ifaceName(h.inIface, h.inMask), ifaceName(h.outIface, h.outMask)
	h.arp = arpConditions{
		hlen: b[16], hlenMask: b[17],
		srcMAC: part(18, 16), srcMACMask: part(34, 16), dstMAC: part(50, 16), dstMACMask: part(66, 16),
		op: u16(82), opMask: u16(84), hwType: u16(86), hwTypeMask: u16(88), protoType: u16(90), protoMask: u16(92),
		inv: binary.NativeEndian.Uint16(b[160:]),
	}
	for _, bit := range []struct {
		arp uint16
		inv uint8
	}{{arpInvIn, invIn}, {arpInvOut, invOut}, {arpInvSrc, invSrc}, {arpInvDst, invDst}} {
		if h.arp.inv&bit.arp != 0 {
			h.InvFlags |= bit.inv
		}
	}
	return h
}

// ifaceName returns the name with iptables' "+" where the mask does not cover
// the NUL that ends it.
func ifaceName(name, mask []byte) string {
	n := 0
	for n < len(name) && n < len(mask) && mask[n] != 0 {
		n++
	}
	if n == 0 {
		return ""
	}
	s := cString(name[:n])
	if len(s) == n && n < ifNameSize {
		return s + "+"
	}
	return s
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// matchesAll reports that no packet can fail the header's conditions.
func (h *Header) matchesAll(l layout) bool {
	if h.InvFlags != 0 || h.Proto != 0 {
		return false
	}
	switch {
	case l.family == IPv4 && h.Flags&ip4FlagFrag != 0, l.family == IPv6 && h.Flags&ip6FlagProto != 0,
		l.family == ARP && !h.arp.matchesAll():
		return false
	}
	return allZero(h.Src) && allZero(h.Dst) && allZero(h.SrcMask) && allZero(h.DstMask) &&
		allZero(h.inMask) && allZero(h.outMask)
}

func (h *arpConditions) matchesAll() bool {
	return h.inv == 0 && h.matchesAny()
}

// matchesAny is that without the inverted conditions.
func (h *arpConditions) matchesAny() bool {
	return h.hlen|h.hlenMask == 0 &&
		h.op|h.opMask|h.hwType|h.hwTypeMask|h.protoType|h.protoMask == 0 &&
		allZero(h.srcMAC) && allZero(h.srcMACMask) && allZero(h.dstMAC) && allZero(h.dstMACMask)
}

// indexAt returns the entry that starts at a byte offset.
func (t *Table) indexAt(off int64) (int, bool) {
	i := sort.Search(len(t.Entries), func(i int) bool { return int64(t.Entries[i].Offset) >= off })
	return i, i < len(t.Entries) && int64(t.Entries[i].Offset) == off
}

// EntryOffset returns where entry i starts, in bytes from the blob's start
// (the same in the kernel's copy), or -1 if there is no such entry.
func (t *Table) EntryOffset(i int) int {
	if i < 0 || i >= len(t.Entries) {
		return -1
	}
	return t.Entries[i].Offset
}

// name gives every entry its chain and number, and finds what Walk needs of
// the whole table.
func (t *Table) name() {
	starts := map[int]string{}
	for h := range NumHooks {
		if t.HookEntry[h] >= 0 {
			starts[t.HookEntry[h]] = t.Family.hookNames()[h]
		}
	}
	chain, num := "", 0
	seg := int32(0)
	inUser := false
	for i := range t.Entries {
		e := &t.Entries[i]
		num++
		if e.Kind == TargetError {
			chain, num, inUser = cString(e.Data), 0, true
			seg++
		} else if s, ok := starts[i]; ok && !inUser {
			chain, num = s, 1
		}
		e.Chain, e.Num, e.seg = chain, num, seg
		if e.Kind == TargetReturn && e.uncond && inUser &&
			i+1 < len(t.Entries) && t.Entries[i+1].Kind == TargetError {
			e.IsEnd = true
		}
	}
	t.segs = int(seg) + 1

	t.nextAlways = make([]int32, len(t.Entries))
	next := int32(len(t.Entries))
	for i := len(t.Entries) - 1; i >= 0; i-- {
		if t.Entries[i].always {
			next = int32(i)
		}
		t.nextAlways[i] = next
	}
}

// TraceName returns what the kernel's TRACE prints for entry i in a run that
// started at hook: chain, "rule", "return" or "policy", and number. It
// mirrors net/ipv4/netfilter/ip_tables.c:get_chainname_rulenum, which calls
// every unconditional verdict or RETURN of the hook's own chain "policy" and of
// a user chain "return". arp_tables has no TRACE; its rules are named alike.
func (t *Table) TraceName(hook, i int) (chain, kind string, num int) {
	root := t.HookEntry[hook]
	e := &t.Entries[i]
	kind = "rule"
	if i < root {
		// The kernel looks only from the hook's start on and comes to the end.
		last := &t.Entries[len(t.Entries)-1]
		return last.Chain, kind, last.Num
	}
	base := t.Entries[root].seg == e.seg
	if base {
		chain, num = t.Family.hookNames()[hook], i-root+1
	} else {
		chain, num = e.Chain, e.Num
	}
	if e.uncond && (e.Kind == TargetVerdict || e.Kind == TargetReturn) {
		kind = "return"
		if base {
			kind = "policy"
		}
	}
	return chain, kind, num
}
