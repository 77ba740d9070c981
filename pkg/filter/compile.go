package filter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf/asm"
)

// maxInstructions bounds a compiled filter, as BPF_MAXINSNS bounds libpcap's.
// It keeps every jump far inside its 16-bit offset.
const maxInstructions = 4096

// cond is a condition on the tuple: conj, disj, negation, test, or the leaf of
// an Expr that is made of them.
type cond interface{ isCond() }

type (
	// conj is true if all are; a condition behind a false one is not evaluated.
	conj []cond
	// disj is true if one is; a condition behind a true one is not evaluated.
	disj []cond
	// negation is true if x is false.
	negation struct{ x cond }
	// test compares one field, after some arithmetic modulo 2^32, with a constant.
	test struct {
		field
		need avail // what must be readable, or else the filter does not match
		alu  []alu
		op   asm.JumpOp
		k    uint32
	}
)

func (conj) isCond()     {}
func (disj) isCond()     {}
func (negation) isCond() {}
func (test) isCond()     {}

// field is a place in the tuple.
type field struct {
	off  uintptr
	size asm.Size
}

// alu is a 32-bit operation on the value under test.
type alu struct {
	op asm.ALUOp
	k  uint32
}

// avail is a number of bytes of L3 and of L4.
type avail struct{ l3, l4 uint8 }

var (
	fieldLen         = field{unsafe.Offsetof(Tuple{}.Len), asm.Word}
	fieldEtherType   = field{unsafe.Offsetof(Tuple{}.EtherType), asm.Half}
	fieldSPort       = field{unsafe.Offsetof(Tuple{}.SPort), asm.Half}
	fieldDPort       = field{unsafe.Offsetof(Tuple{}.DPort), asm.Half}
	fieldVLAN        = field{unsafe.Offsetof(Tuple{}.VLAN), asm.Half}
	fieldFragOff     = field{unsafe.Offsetof(Tuple{}.FragOff), asm.Half}
	fieldFlags       = field{unsafe.Offsetof(Tuple{}.Flags), asm.Half}
	fieldNextHdr     = field{unsafe.Offsetof(Tuple{}.NextHdr), asm.Byte}
	fieldFragNextHdr = field{unsafe.Offsetof(Tuple{}.FragNextHdr), asm.Byte}
	fieldTCPFlags    = field{unsafe.Offsetof(Tuple{}.TCPFlags), asm.Byte}
	fieldICMPType    = field{unsafe.Offsetof(Tuple{}.ICMPType), asm.Byte}
	fieldICMPCode    = field{unsafe.Offsetof(Tuple{}.ICMPCode), asm.Byte}
)

// The conditions below are those of libpcap's gencode.c, function by function,
// with the bytes it loads in the order in which it loads them.

func equal(f field, need avail, k uint32) cond {
	return test{field: f, need: need, op: asm.JEq, k: k}
}

func flagSet(flag uint32) cond {
	return test{field: fieldFlags, alu: []alu{{asm.And, flag}}, op: asm.JNE}
}

// direction joins the source's and the destination's condition (Q_SRC, Q_DST,
// Q_OR, Q_AND).
func direction(d dir, src, dst cond) cond {
	switch d {
	case dirSrc:
		return src
	case dirDst:
		return dst
	case dirAnd:
		return conj{src, dst}
	default:
		return disj{src, dst}
	}
}

// etherType is gen_linktype: the type that libpcap reads where it expects it,
// which is the type of the tag unless vlan went before.
func etherType(behindTag bool, typ uint16) cond {
	eq := equal(fieldEtherType, avail{}, uint32(typ))
	if behindTag {
		return eq
	}
	return conj{negation{flagSet(FlagVLAN)}, eq}
}

// hostIPv4 is gen_hostop; need has the bytes of L3 up to the end of either address.
func hostIPv4(link cond, addr, mask uint32, d dir, srcEnd, dstEnd uint8) cond {
	word := func(off uintptr, end uint8) cond {
		if mask == 0 {
			return link
		}
		return conj{link, masked(field{off, asm.Word}, avail{l3: end}, memory(addr), memory(mask))}
	}
	return direction(d,
		word(unsafe.Offsetof(Tuple{}.SAddr), srcEnd),
		word(unsafe.Offsetof(Tuple{}.DAddr), dstEnd))
}

// hostIPv6 is gen_hostop6.
func hostIPv6(link cond, p netip.Prefix, d dir) cond {
	addr := p.Addr().As16()
	words := func(off uintptr, start uint8) cond {
		all := conj{link}
		for i := range 4 {
			bits := min(max(p.Bits()-32*i, 0), 32)
			if bits == 0 {
				break
			}
			all = append(all, masked(
				field{off + uintptr(4*i), asm.Word},
				avail{l3: start + uint8(4*i) + 4},
				memory(binary.BigEndian.Uint32(addr[4*i:])),
				memory(^uint32(0)<<(32-bits))))
		}
		return all
	}
	return direction(d,
		words(unsafe.Offsetof(Tuple{}.SAddr), 8),
		words(unsafe.Offsetof(Tuple{}.DAddr), 24))
}

// masked compares the bits of a field that are set in mask.
func masked(f field, need avail, k, mask uint32) cond {
	t := test{field: f, need: need, op: asm.JEq, k: k}
	if mask != ^uint32(0) {
		t.alu = []alu{{asm.And, mask}}
	}
	return t
}

// memory turns a big-endian number into what a load of its bytes gives.
func memory(v uint32) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return binary.NativeEndian.Uint32(b[:])
}

// hostEther is gen_ehostop. A MAC is not aligned to words, and the verifier
// wants aligned loads from the stack.
func hostEther(mac [6]byte, d dir) cond {
	halves := func(off uintptr) cond {
		all := conj{flagSet(FlagMAC)}
		for i := uintptr(0); i < 6; i += 2 {
			all = append(all, equal(field{off + i, asm.Half}, avail{}, uint32(binary.NativeEndian.Uint16(mac[i:]))))
		}
		return all
	}
	return direction(d,
		halves(unsafe.Offsetof(Tuple{}.SMAC)),
		halves(unsafe.Offsetof(Tuple{}.DMAC)))
}

// protoIPv4 is gen_proto for ip.
func protoIPv4(behindTag bool, n uint8) cond {
	return conj{etherType(behindTag, etherIPv4), equal(fieldNextHdr, avail{l3: 10}, uint32(n))}
}

// protoIPv6 is gen_proto for ip6, which looks behind a fragment header too.
func protoIPv6(behindTag bool, n uint8) cond {
	return conj{
		etherType(behindTag, etherIPv6),
		disj{
			equal(fieldNextHdr, avail{l3: 7}, uint32(n)),
			conj{
				equal(fieldNextHdr, avail{l3: 7}, protoFrag),
				equal(fieldFragNextHdr, avail{l3: 41}, uint32(n)),
			},
		},
	}
}

func firstFragment() cond {
	return equal(fieldFragOff, avail{l3: 8}, 0)
}

// ports is gen_port6 or gen_port, or their portrange counterparts. An IPv6
// packet has ports only if they lie directly behind its fixed header, an IPv4
// packet only if it is no later fragment.
func ports(behindTag bool, protos []uint8, lo, hi uint16, d dir) cond {
	oneOf := func(need avail) cond {
		var any disj
		for _, p := range protos {
			any = append(any, equal(fieldNextHdr, need, uint32(p)))
		}
		return any
	}
	inRange := func(f field, need avail) cond {
		if lo == hi {
			return equal(f, need, uint32(lo))
		}
		return conj{
			test{field: f, need: need, op: asm.JGE, k: uint32(lo)},
			test{field: f, need: need, op: asm.JLE, k: uint32(hi)},
		}
	}
	match := direction(d, inRange(fieldSPort, avail{l4: 2}), inRange(fieldDPort, avail{l4: 4}))
	return disj{
		conj{etherType(behindTag, etherIPv6), oneOf(avail{l3: 7}), match},
		conj{etherType(behindTag, etherIPv4), oneOf(avail{l3: 10}), firstFragment(), match},
	}
}

// label is a place in the code that is not known yet.
type label int

const (
	labelMatch label = iota
	labelNoMatch
	labelFirstFree
)

// Registers of a compiled filter; R1 stays the tuple.
const (
	regTuple = asm.R1
	regValue = asm.R0
	regL3    = asm.R2
	regL4    = asm.R3
	regConst = asm.R4
)

// assembler emits code with forward jumps only.
type assembler struct {
	insns asm.Instructions
	jumps []label       // where each instruction jumps to, or -1
	at    map[label]int // where each placed label is
	free  label
}

// compile turns a condition into a function body: R1 points to the tuple, R0
// returns 1 for a match and 0 otherwise. A nil condition is always true.
func compile(c cond) (asm.Instructions, error) {
	if c == nil {
		return asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}, nil
	}
	a := assembler{at: make(map[label]int), free: labelFirstFree}
	most := uses(c)
	if most.l3 > 0 {
		a.emit(asm.LoadMem(regL3, regTuple, int16(unsafe.Offsetof(Tuple{}.L3Avail)), asm.Byte))
	}
	if most.l4 > 0 {
		a.emit(asm.LoadMem(regL4, regTuple, int16(unsafe.Offsetof(Tuple{}.L4Avail)), asm.Byte))
	}
	a.branch(c, labelMatch, labelNoMatch, labelMatch, avail{})
	a.place(labelMatch)
	a.emit(asm.Mov.Imm(asm.R0, 1))
	a.emit(asm.Return())
	a.place(labelNoMatch)
	a.emit(asm.Mov.Imm(asm.R0, 0))
	a.emit(asm.Return())
	if len(a.insns) > maxInstructions {
		return nil, fmt.Errorf("the expression needs %d instructions, %d are allowed: shorten it, for example with net or portrange",
			len(a.insns), maxInstructions)
	}
	for i, to := range a.jumps {
		if to >= 0 {
			a.insns[i].Offset = int16(a.at[to] - i - 1)
		}
	}
	return a.insns, nil
}

// uses returns the most that any test in c needs of L3 and of L4.
func uses(c cond) avail {
	var most avail
	join := func(a avail) { most = avail{max(most.l3, a.l3), max(most.l4, a.l4)} }
	switch c := c.(type) {
	case conj:
		for _, x := range c {
			join(uses(x))
		}
	case disj:
		for _, x := range c {
			join(uses(x))
		}
	case negation:
		return uses(c.x)
	case *leaf:
		return uses(c.cond)
	case test:
		return c.need
	}
	return most
}

func (a *assembler) emit(ins asm.Instruction) {
	a.insns = append(a.insns, ins)
	a.jumps = append(a.jumps, -1)
}

func (a *assembler) jump(op asm.OpCode, dst, src asm.Register, k int64, to label) {
	a.insns = append(a.insns, asm.Instruction{OpCode: op, Dst: dst, Src: src, Constant: k})
	a.jumps = append(a.jumps, to)
}

func (a *assembler) place(l label) { a.at[l] = len(a.insns) }

func (a *assembler) newLabel() label {
	a.free++
	return a.free - 1
}

// branch emits code that goes to yes or to no; next is the label that will be
// placed behind the code, which need not be jumped to. have is what is known to
// be readable; branch returns what is known behind the code, wherever it goes.
func (a *assembler) branch(c cond, yes, no, next label, have avail) avail {
	switch c := c.(type) {
	case conj:
		return a.chain(c, have, func(x cond, then label, have avail) avail {
			return a.branch(x, then, no, then, have)
		}, func(x cond, have avail) avail {
			return a.branch(x, yes, no, next, have)
		})
	case disj:
		return a.chain(c, have, func(x cond, then label, have avail) avail {
			return a.branch(x, yes, then, then, have)
		}, func(x cond, have avail) avail {
			return a.branch(x, yes, no, next, have)
		})
	case negation:
		return a.branch(c.x, no, yes, next, have)
	case *leaf:
		return a.branch(c.cond, yes, no, next, have)
	case test:
		return a.test(c, yes, no, next, have)
	}
	panic(fmt.Sprintf("filter: condition of unknown type %T", c))
}

// chain emits conditions one behind the other. Only the first is evaluated in
// any case, so only what it has checked is known behind the chain.
func (a *assembler) chain(all []cond, have avail, inner func(cond, label, avail) avail, last func(cond, avail) avail) avail {
	var known avail
	for i, x := range all {
		if i == len(all)-1 {
			have = last(x, have)
		} else {
			then := a.newLabel()
			have = inner(x, then, have)
			a.place(then)
		}
		if i == 0 {
			known = have
		}
	}
	return known
}

func (a *assembler) test(t test, yes, no, next label, have avail) avail {
	if t.need.l3 > have.l3 {
		a.jump(asm.JLT.Op(asm.ImmSource), regL3, 0, int64(t.need.l3), labelNoMatch)
		have.l3 = t.need.l3
	}
	if t.need.l4 > have.l4 {
		a.jump(asm.JLT.Op(asm.ImmSource), regL4, 0, int64(t.need.l4), labelNoMatch)
		have.l4 = t.need.l4
	}
	a.emit(asm.LoadMem(regValue, regTuple, int16(t.off), t.size))
	for _, op := range t.alu {
		a.emit(op.op.Imm32(regValue, int32(op.k)))
	}
	op, to, other := t.op, yes, no
	if yes == next {
		op, to, other = inverse[op], no, yes
	}
	if int32(t.k) >= 0 {
		a.jump(op.Op(asm.ImmSource), regValue, 0, int64(t.k), to)
	} else {
		// An immediate would be extended with its sign to 64 bits.
		a.emit(asm.Mov.Imm32(regConst, int32(t.k)))
		a.jump(op.Op(asm.RegSource), regValue, regConst, 0, to)
	}
	if other != next {
		a.jump(asm.Ja.Op(asm.ImmSource), 0, 0, 0, other)
	}
	return have
}

var inverse = map[asm.JumpOp]asm.JumpOp{
	asm.JEq: asm.JNE, asm.JNE: asm.JEq,
	asm.JGT: asm.JLE, asm.JLE: asm.JGT,
	asm.JGE: asm.JLT, asm.JLT: asm.JGE,
}
