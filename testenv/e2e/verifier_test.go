package e2e

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
)

// A kernel's verifier looks at no program for long. On 6.1, the time it takes grows with the square
// of the instructions that it follows: with 217,000 in one program, attaching took three minutes.
func TestVerifier(t *testing.T) {
	needNftrace(t)
	const most = 100_000
	sh(t, "modprobe -a ip_tables ip6_tables arp_tables br_netfilter nf_nat nf_defrag_ipv6 nf_tables nf_flow_table nfnetlink_queue ebtables")
	for _, backend := range []string{"auto", "kprobe"} {
		t.Run(backend, func(t *testing.T) {
			before := verified(t)
			p := attached(t, "", nil, "--backend", backend)
			programs := 0
			for id, prog := range verified(t) {
				if _, ok := before[id]; ok {
					continue
				}
				programs++
				if prog.instructions > most {
					t.Errorf("the verifier followed %d instructions of %s, want at most %d", prog.instructions, prog.name, most)
				}
			}
			if programs < 30 {
				t.Errorf("%d programs of nftrace's, want 30 at least", programs)
			}
			p.signal(syscall.SIGINT)
			p.want(0)
		})
	}
}

type verifiedProgram struct {
	name         string
	instructions uint32
}

// verified are the programs that the kernel has, by their ID.
func verified(t *testing.T) map[ebpf.ProgramID]verifiedProgram {
	t.Helper()
	all := map[ebpf.ProgramID]verifiedProgram{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
		prog, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it is no more
		}
		info, err := prog.Info()
		prog.Close()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Skip("the kernel does not tell (before Linux 5.16)")
		}
		all[id] = verifiedProgram{info.Name, n}
	}
}
