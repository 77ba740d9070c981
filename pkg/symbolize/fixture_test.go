package symbolize

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Fixtures are tables as a kernel gave them: testdata/SET.FAMILY.TABLE.bin is
// struct ipt_getinfo and the entries, .save beside it what iptables-save printed.
// They are made from testdata/rules/ by
//
//	NFTRACE_CAPTURE=1 unshare -n go test -run TestCapture ./pkg/symbolize
func TestCapture(t *testing.T) {
	if os.Getenv("NFTRACE_CAPTURE") == "" {
		t.Skip("makes fixtures; wants root, a throwaway network namespace and NFTRACE_CAPTURE=1")
	}
	for _, set := range []struct {
		file   string
		family Family
		prog   string
	}{
		{"docker.v4", IPv4, "iptables-legacy"},
		{"goto.v4", IPv4, "iptables-legacy"},
		{"six.v6", IPv6, "ip6tables-legacy"},
		{"arp.arp", ARP, "sh"},
	} {
		rules, err := os.ReadFile(filepath.Join("testdata/rules", set.file))
		if err != nil {
			t.Fatal(err)
		}
		restore := exec.Command(set.prog + "-restore")
		if set.family == ARP {
			restore = exec.Command(set.prog, "-e")
		}
		restore.Stdin = bytes.NewReader(rules)
		if out, err := restore.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", set.file, err, out)
		}
		for _, line := range strings.Split(string(rules), "\n") {
			table, ok := strings.CutPrefix(strings.TrimPrefix(line, "# "), "*")
			if !ok {
				continue
			}
			if _, err := ReadTable(set.family, table); err != nil {
				t.Fatal(err)
			}
			info, blob, err := readBlob(set.family, table)
			if err != nil {
				t.Fatal(err)
			}
			save := exec.Command(set.prog+"-save", "-t", table)
			if set.family == ARP {
				save = exec.Command("arptables-legacy", "-t", table, "-L", "-n")
			}
			text, err := save.Output()
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Join("testdata", set.file+"."+table)
			if err := os.WriteFile(name+".bin", append(putInfo(set.family, table, info), blob...), 0o644); err != nil {
				t.Fatal(err)
			}
			// The save file names the time; the fixture does not.
			var kept []string
			for _, l := range strings.SplitAfter(string(text), "\n") {
				if !strings.HasPrefix(l, "#") {
					kept = append(kept, l)
				}
			}
			if err := os.WriteFile(name+".save", []byte(strings.Join(kept, "")), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

type fixture struct {
	name  string
	table *Table
	save  string
}

// loadFixture reads testdata/NAME.bin and .save, NAME as "docker.v4.filter".
func loadFixture(t testing.TB, name string) fixture {
	t.Helper()
	family, info, table, blob := fixtureBytes(t, name)
	tab, err := ParseTable(family, table, info, blob)
	if err != nil {
		t.Fatal(err)
	}
	save, err := os.ReadFile(filepath.Join("testdata", name+".save"))
	if err != nil {
		t.Fatal(err)
	}
	return fixture{name: name, table: tab, save: string(save)}
}

func fixtureBytes(t testing.TB, name string) (Family, Info, string, []byte) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	family := IPv4
	switch {
	case strings.Contains(name, ".v6."):
		family = IPv6
	case strings.Contains(name, ".arp."):
		family = ARP
	}
	return family, parseInfo(family, b), name[strings.LastIndexByte(name, '.')+1:], b[infoSize(family):]
}

func fixtureNames(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.bin")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".bin")
	}
	return files
}
