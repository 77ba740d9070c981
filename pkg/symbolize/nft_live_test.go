package symbolize

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNFTLive compares what this kernel and the programs here say of the
// rulesets in testdata/rules.
func TestNFTLive(t *testing.T) {
	dir, err := filepath.Abs("testdata/rules")
	if err != nil {
		t.Fatal(err)
	}
	s, a, b := inNamespaces(t, fmt.Sprintf(`
		for p in $A $B; do
			nsenter -n -t $p ip link add d0 type dummy
		done
		nsenter -n -t $A nft -f %[1]s/nft-native.nft
		nsenter -n -t $B sh -e %[1]s/nft-compat.sh`, dir))
	modules := func() []byte {
		m, err := os.ReadFile("/proc/modules")
		if err != nil {
			t.Fatal(err)
		}
		var names [][]byte
		for l := range bytes.Lines(m) {
			names = append(names, bytes.Fields(l)[0])
		}
		return bytes.Join(names, []byte(" "))
	}
	before := modules()
	for _, tt := range []struct{ pid, tables, rules int }{{a, 9, 40}, {b, 8, 41}} {
		ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", tt.pid))
		if err != nil {
			t.Fatal(err)
		}
		r, err := ReadNFT(ns, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Tables) != tt.tables || len(rulesOf(r)) != tt.rules {
			t.Errorf("%d tables, %d rules", len(r.Tables), len(rulesOf(r)))
		}
		if native := r.ReadTexts(ns); native != "" {
			t.Error(native)
		}
		err = ns.Do(func() error {
			list, err := exec.Command("nft", "-a", "-s", "list", "ruleset").Output()
			if err != nil {
				return err
			}
			compareNFT(t, r, func(tab *NFTTable) ([]byte, error) {
				prog := nftSavePrograms[tab.Family] + "-nft-save"
				if tab.Family == unix.NFPROTO_ARP {
					return exec.Command(prog).Output()
				}
				return exec.Command(prog, "-t", tab.Name).Output()
			}, list)
			return nil
		})
		if err != nil {
			t.Error(err)
		}

		nft := func(cmd string) {
			t.Helper()
			err := ns.Do(func() error {
				nft := exec.Command("nft", "-f", "-")
				nft.Stdin = bytes.NewReader([]byte(cmd))
				out, err := nft.CombinedOutput()
				if err != nil {
					return fmt.Errorf("%s: %w: %s", cmd, err, out)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		old, err := ReadNFT(ns, nil)
		if err != nil {
			t.Fatal(err)
		}
		nft("add table inet more")
		nft("delete table inet more")

		// old is of a ruleset that is no more; r has its texts.
		if native := old.ReadTexts(ns); native == "" {
			t.Error("texts of a ruleset that has changed")
		}
		if native := r.ReadTexts(ns); native != "" {
			t.Error(native)
		}
		again, err := ReadNFT(ns, nil)
		if err != nil {
			t.Fatal(err)
		}
		if again.Gen <= r.Gen || len(rulesOf(again)) != tt.rules {
			t.Errorf("generation %d after %d, %d rules: %v", again.Gen, r.Gen, len(rulesOf(again)), err)
		}
	}
	if after := modules(); !slices.Equal(before, after) {
		t.Errorf("modules before %s\nafter %s", before, after)
	}
}
