package filter

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// accessor is a byte of the packet, or its length, that can be compared.
type accessor struct {
	text  string
	field field
	need  avail
	where cond // the packets that have it, or nil
}

// accessors by protocol and index. Those of TCP and ICMP are defined for IPv4
// only, as in libpcap 1.10.3.
func (p *parser) accessor(proto string, index uint32) (accessor, bool) {
	type place struct {
		proto string
		index uint32
	}
	ipv4 := func(n uint8) cond { return conj{protoIPv4(p.behindTag, n), firstFragment()} }
	a := accessor{text: fmt.Sprintf("%s[%d]", proto, index)}
	switch (place{proto, index}) {
	case place{"tcp", 13}:
		a.field, a.need, a.where = fieldTCPFlags, avail{l4: 14}, ipv4(protoTCP)
	case place{"icmp", 0}:
		a.field, a.need, a.where = fieldICMPType, avail{l4: 1}, ipv4(protoICMP)
	case place{"icmp", 1}:
		a.field, a.need, a.where = fieldICMPCode, avail{l4: 2}, ipv4(protoICMP)
	case place{"icmp6", 0}, place{"icmp6", 1}:
		a.field, a.need = fieldICMPType, avail{l4: 1}
		if index == 1 {
			a.field, a.need = fieldICMPCode, avail{l4: 2}
		}
		a.where = conj{etherType(p.behindTag, etherIPv6), equal(fieldNextHdr, avail{l3: 7}, protoICMPv6)}
	default:
		return a, false
	}
	return a, true
}

// arith is one side of a comparison: an accessor with constant operations
// applied, or a constant.
type arith struct {
	accessor *accessor
	token    token // where it begins
	text     string
	alu      []alu
	k        uint32 // where accessor is nil
}

var comparisons = map[string]asm.JumpOp{
	"==": asm.JEq, "!=": asm.JNE, ">": asm.JGT, ">=": asm.JGE, "<": asm.JLT, "<=": asm.JLE,
}

// relation parses arithmetic, comparison, constant.
func (p *parser) relation() cond {
	left := p.arith(0)
	if p.err == nil && left.accessor == nil {
		p.fail(left.token, "a comparison must begin with tcp[…], icmp[…], icmp6[…] or len, not with %q,", left.token.text)
	}
	op, ok := comparisons[p.peek().text]
	if !ok || p.peek().kind != kindSymbol {
		p.unexpected("a comparison (== != < <= > >=)")
		return nil
	}
	opText := p.take().text
	right := p.arith(0)
	if p.err == nil && right.accessor != nil {
		p.fail(right.token, "only a constant can stand behind the comparison, not %q,", right.token.text)
	}
	if p.err != nil {
		return nil
	}

	a := left.accessor
	c := cond(test{field: a.field, need: a.need, alu: left.alu, op: op, k: right.k})
	text := fmt.Sprintf("%s %s %d", left.text, opText, right.k)
	if a.where == nil {
		return &leaf{token: left.token, text: text, cond: c}
	}
	return p.inPacket(left.token, text, conj{a.where, c})
}

// operators from the weakest to the strongest; all bind to the left.
var operators = [][]string{{"|"}, {"&"}, {"<<", ">>"}, {"+", "-"}, {"*", "/"}}

func (p *parser) arith(level int) arith {
	if level == len(operators) {
		return p.operand()
	}
	left := p.arith(level + 1)
	for p.err == nil && p.isSymbol(operators[level]...) {
		op := p.take()
		left = p.operate(left, op, p.arith(level+1))
	}
	return left
}

// operate applies an operator. Constants are folded; an accessor can only
// stand on the left.
func (p *parser) operate(l arith, op token, r arith) arith {
	switch {
	case p.err != nil:
		return l
	case r.accessor != nil:
		p.fail(r.token, "only a constant can stand on the right of %q, not %q,", op.text, r.token.text)
		return l
	case op.text == "/" && r.k == 0:
		p.fail(op, "division by zero")
		return l
	case (op.text == "<<" || op.text == ">>") && r.k > 31:
		p.fail(op, "shift by more than 31 bits")
		return l
	}
	ins := alu{k: r.k}
	var folded uint32
	switch op.text {
	case "|":
		ins.op, folded = asm.Or, l.k|r.k
	case "&":
		ins.op, folded = asm.And, l.k&r.k
	case "<<":
		ins.op, folded = asm.LSh, l.k<<r.k
	case ">>":
		ins.op, folded = asm.RSh, l.k>>r.k
	case "+":
		ins.op, folded = asm.Add, l.k+r.k
	case "-":
		ins.op, folded = asm.Sub, l.k-r.k
	case "*":
		ins.op, folded = asm.Mul, l.k*r.k
	case "/":
		ins.op = asm.Div
		folded = l.k / r.k
	}
	if l.accessor == nil {
		l.k = folded
		return l
	}
	l.alu = append(l.alu, ins)
	l.text = fmt.Sprintf("(%s %s %d)", l.text, op.text, r.k)
	return l
}

// operand parses a number, len, an accessor, or arithmetic in parentheses.
func (p *parser) operand() arith {
	if !p.enter() {
		return arith{}
	}
	defer p.leave()
	t := p.peek()
	switch {
	case t.kind == kindNumber:
		p.take()
		return arith{token: t, k: t.num}
	case p.accept("("):
		a := p.arith(0)
		p.expect(")")
		return a
	case p.accept("len"):
		return arith{token: t, text: t.text, accessor: &accessor{text: t.text, field: fieldLen}}
	case t.kind == kindSymbol && p.peekAt(1).text == "[":
		p.take()
		p.take()
		return p.index(t)
	}
	p.unexpected("a number, len, tcp[…], icmp[…] or icmp6[…]")
	return arith{}
}

// index parses what is inside of proto[…] and the closing bracket.
func (p *parser) index(proto token) arith {
	at := p.peek()
	i := p.arith(0)
	if p.accept(":") {
		if size := p.take(); size.kind != kindNumber || size.num != 1 {
			p.fail(size, "only single bytes can be read from %s[…], not a size of %q,", proto.text, size.text)
		}
	}
	p.expect("]")
	if p.err != nil {
		return arith{}
	}
	if i.accessor != nil {
		p.fail(at, "the index of %s[…] must be a constant", proto.text)
		return arith{}
	}
	a, ok := p.accessor(proto.text, i.k)
	if !ok {
		p.fail(proto, "unsupported %s[%d] (supported are tcp[tcpflags], icmp[icmptype], icmp[icmpcode], icmp6[icmp6type], icmp6[icmp6code])",
			proto.text, i.k)
		return arith{}
	}
	return arith{token: proto, text: a.text, accessor: &a}
}
