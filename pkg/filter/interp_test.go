package filter

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf/asm"
)

// run interprets the instructions that the compiler emits.
func run(insns asm.Instructions, t *Tuple) (uint64, error) {
	mem := unsafe.Slice((*byte)(unsafe.Pointer(t)), unsafe.Sizeof(*t))
	var regs [11]uint64
	var set [11]bool
	set[asm.R1] = true
	for pc := 0; pc < len(insns); pc++ {
		ins := insns[pc]
		src := uint64(ins.Constant)
		if ins.OpCode.Class() != asm.LdXClass && ins.OpCode.Source() == asm.RegSource {
			if !set[ins.Src] {
				return 0, fmt.Errorf("instruction %d reads %s, which is not set", pc, ins.Src)
			}
			src = regs[ins.Src]
		}
		switch class := ins.OpCode.Class(); class {
		case asm.LdXClass:
			size := ins.OpCode.Size().Sizeof()
			off := int(ins.Offset)
			if ins.Src != asm.R1 || off < 0 || off+size > len(mem) || off%size != 0 {
				return 0, fmt.Errorf("instruction %d is a bad load: %v", pc, ins)
			}
			switch size {
			case 1:
				regs[ins.Dst] = uint64(mem[off])
			case 2:
				regs[ins.Dst] = uint64(binary.NativeEndian.Uint16(mem[off:]))
			case 4:
				regs[ins.Dst] = uint64(binary.NativeEndian.Uint32(mem[off:]))
			}
			set[ins.Dst] = true
		case asm.ALUClass, asm.ALU64Class:
			op := ins.OpCode.ALUOp()
			if op != asm.Mov && !set[ins.Dst] {
				return 0, fmt.Errorf("instruction %d reads %s, which is not set", pc, ins.Dst)
			}
			if class == asm.ALU64Class && op != asm.Mov {
				return 0, fmt.Errorf("instruction %d: 64-bit %s", pc, op)
			}
			dst, imm := uint32(regs[ins.Dst]), uint32(src)
			switch op {
			case asm.Mov:
				dst = imm
			case asm.And:
				dst &= imm
			case asm.Or:
				dst |= imm
			case asm.LSh:
				dst <<= imm
			case asm.RSh:
				dst >>= imm
			case asm.Add:
				dst += imm
			case asm.Sub:
				dst -= imm
			case asm.Mul:
				dst *= imm
			case asm.Div:
				dst /= imm
			default:
				return 0, fmt.Errorf("instruction %d: unknown %s", pc, op)
			}
			regs[ins.Dst], set[ins.Dst] = uint64(dst), true
		case asm.JumpClass:
			op := ins.OpCode.JumpOp()
			if op == asm.Exit {
				if !set[asm.R0] {
					return 0, fmt.Errorf("instruction %d returns R0, which is not set", pc)
				}
				return regs[asm.R0], nil
			}
			if op != asm.Ja && !set[ins.Dst] {
				return 0, fmt.Errorf("instruction %d reads %s, which is not set", pc, ins.Dst)
			}
			taken, known := map[asm.JumpOp]bool{
				asm.Ja:  true,
				asm.JEq: regs[ins.Dst] == src,
				asm.JNE: regs[ins.Dst] != src,
				asm.JGT: regs[ins.Dst] > src,
				asm.JGE: regs[ins.Dst] >= src,
				asm.JLT: regs[ins.Dst] < src,
				asm.JLE: regs[ins.Dst] <= src,
			}[op]
			if !known || taken && ins.Offset < 0 {
				return 0, fmt.Errorf("instruction %d is a bad jump: %v", pc, ins)
			}
			if taken {
				pc += int(ins.Offset)
			}
		default:
			return 0, fmt.Errorf("instruction %d is of unknown class %s", pc, class)
		}
	}
	return 0, fmt.Errorf("ran off the end")
}
