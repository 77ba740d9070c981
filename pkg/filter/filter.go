package filter

import (
	"fmt"
	"strings"

	"github.com/cilium/ebpf/asm"
)

// Expr is a compiled filter expression.
type Expr struct {
	root  cond
	insns asm.Instructions
}

// Parse compiles an expression; a blank one matches every packet. The error
// names in one line the word that is wrong or not supported, its position in
// bytes from 1 on, and the cure.
func Parse(expr string) (*Expr, error) {
	root, err := parse(expr)
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	insns, err := compile(root)
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	return &Expr{root: root, insns: insns}, nil
}

// Instructions returns a copy of the body of a BPF function that takes a
// pointer to a struct pkt_tuple (see Tuple) in R1 and returns 1 in R0 if the
// packet matches, else 0. It has forward jumps only, reads nothing but the
// tuple, uses no stack, calls nothing, and clobbers R0 and R2 to R4. It needs
// the instructions of Linux 4.14 (BPF_JLT).
func (e *Expr) Instructions() asm.Instructions {
	return append(asm.Instructions(nil), e.insns...)
}

// String returns the expression with every qualifier written out, in a form
// that Parse and libpcap read to the same effect.
func (e *Expr) String() string {
	if e.root == nil {
		return ""
	}
	return text(e.root)
}

// leaf is one primitive of an expression.
type leaf struct {
	cond
	token    token  // what to name in an error
	text     string // with all qualifiers
	needsTag bool   // it looks behind the VLAN tag
	vlan     bool   // it is vlan, which has an id if vlanID
	vlanID   bool
}

// text prints a tree that the parser has built.
func text(c cond) string {
	switch c := c.(type) {
	case conj:
		return operand(c[0], false) + " and " + operand(c[1], true)
	case disj:
		return operand(c[0], false) + " or " + operand(c[1], true)
	case negation:
		return "not " + operand(c.x, true)
	case *leaf:
		return c.text
	}
	panic(fmt.Sprintf("filter: condition of unknown type %T", c))
}

// operand prints c, in parentheses where and and or, which bind equally, would
// be misread by libpcap (right) or by a human (or within and).
func operand(c cond, right bool) string {
	s := text(c)
	switch c.(type) {
	case conj, disj:
		if right || strings.Contains(s, " or ") {
			return "(" + s + ")"
		}
	}
	return s
}

// tag is what is known about the VLAN tag at some place of the evaluation.
type tag int

const (
	tagUnknown tag = iota
	tagPresent
	tagAbsent
)

// tagged follows the evaluation of c, and fails where a primitive would look
// behind a tag that may be absent: libpcap then reads the payload as if it were
// the rest of the link header. It returns what is known if c is true and if it
// is false.
func tagged(c cond, before tag) (yes, no tag, err error) {
	switch c := c.(type) {
	case conj:
		rightYes, leftNo, rightNo, err := taggedBoth(c[0], c[1], before, false)
		return rightYes, meet(leftNo, rightNo), err
	case disj:
		rightNo, leftYes, rightYes, err := taggedBoth(c[0], c[1], before, true)
		return meet(leftYes, rightYes), rightNo, err
	case negation:
		no, yes, err = tagged(c.x, before)
		return yes, no, err
	case *leaf:
		switch {
		case c.vlan && c.vlanID:
			return tagPresent, before, nil
		case c.vlan:
			return tagPresent, tagAbsent, nil
		case c.needsTag && before != tagPresent:
			return 0, 0, fmt.Errorf("%q at position %d comes after vlan, so it looks behind a VLAN tag which need not be there: "+
				"join it to vlan with and, or put it before vlan", c.text, c.token.pos+1)
		}
		return before, before, nil
	}
	panic(fmt.Sprintf("filter: condition of unknown type %T", c))
}

// taggedBoth follows l and then r, which is evaluated if l is other than stop.
// It returns what is known behind r if it is other than stop, if l is stop, and
// if r is stop.
func taggedBoth(l, r cond, before tag, stop bool) (through, leftStop, rightStop tag, err error) {
	order := func(yes, no tag) (through, stopped tag) {
		if stop {
			return no, yes
		}
		return yes, no
	}
	yes, no, err := tagged(l, before)
	if err != nil {
		return 0, 0, 0, err
	}
	through, leftStop = order(yes, no)
	yes, no, err = tagged(r, through)
	if err != nil {
		return 0, 0, 0, err
	}
	through, rightStop = order(yes, no)
	return through, leftStop, rightStop, nil
}

// meet is what is known where two ways join.
func meet(a, b tag) tag {
	if a == b {
		return a
	}
	return tagUnknown
}
