package testenv

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The archive must be one that others can read: cpio(1) is the reference.
func TestArchive(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("needs cpio in PATH (package cpio)")
	}
	src := t.TempDir()
	for name, content := range map[string]string{"a": "", "d/b": "odd", "d/e/c": strings.Repeat("x", 70000)} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("e/c", filepath.Join(src, "d/link")); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	a := newArchive(&buf)
	a.tree("/opt/t", src)
	a.data("/opt/data", 0o600, []byte("hello"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	if buf.Len()%4096 != 0 {
		t.Errorf("%d bytes: another archive could not follow", buf.Len())
	}
	dst := t.TempDir()
	cmd := exec.Command("cpio", "-id", "--quiet")
	cmd.Dir, cmd.Stdin = dst, &buf
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]string{"opt/t/a": "", "opt/t/d/b": "odd", "opt/t/d/link": strings.Repeat("x", 70000), "opt/data": "hello"} {
		if got, err := os.ReadFile(filepath.Join(dst, name)); err != nil || string(got) != want {
			t.Errorf("%s: %v, %d bytes", name, err, len(got))
		}
	}
	if st, err := os.Stat(filepath.Join(dst, "opt/t/d/b")); err != nil || st.Mode().Perm() != 0o750 {
		t.Errorf("mode: %v, %v", st.Mode(), err)
	}
}

func TestArchiveErrorSticks(t *testing.T) {
	a := newArchive(&bytes.Buffer{})
	a.file("/x", filepath.Join(t.TempDir(), "nosuch"))
	a.data("/y", 0o644, nil)
	if err := a.close(); !os.IsNotExist(err) {
		t.Errorf("got %v", err)
	}
}

func TestKernelPatterns(t *testing.T) {
	packages := []string{
		"linux-image-6.12.117+deb12-cloud-amd64", "linux-image-6.12.115+deb12-cloud-amd64-unsigned",
		"linux-image-6.12.117+deb12-cloud-arm64", "linux-image-6.12.117+deb12-cloud-amd64-dbg", "linux-image-6.12-cloud-amd64", "linux-image-6.12.117+deb12-amd64",
		"linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64-dbg", "linux-image-cloud-amd64",
		"linux-image-6.12.117+deb12-rt-amd64",
		"linux-image-6.18.15+deb13-cloud-amd64", "linux-image-6.18.15+deb13-amd64", "linux-image-6.19.8+deb13-cloud-amd64",
		"linux-image-7.3.4+deb13-cloud-amd64", "linux-binary-7.3.4+deb13-cloud-amd64", "linux-binary-unsigned-7.2.13+deb14-cloud-amd64",
		"linux-binary-7.3-cloud-amd64", "linux-binary-6.19.8+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64",
		"linux-image-5.10.0-46-cloud-amd64", "linux-image-5.10.0-46-cloud-amd64-unsigned", "linux-image-5.10.0-46-amd64",
		"linux-source-6.12", "linux-source-6.1", "linux-source",
	}
	want := map[string][]string{
		"6.12":       {"linux-image-6.12.117+deb12-cloud-amd64", "linux-image-6.12.115+deb12-cloud-amd64-unsigned"},
		"6.1":        {"linux-image-6.1.0-56-cloud-amd64"},
		"6.18":       {"linux-image-6.18.15+deb13-cloud-amd64"},
		"7.x":        {"linux-binary-7.3.4+deb13-cloud-amd64", "linux-binary-unsigned-7.2.13+deb14-cloud-amd64"},
		"6.12-arm64": {"linux-image-6.12.117+deb12-cloud-arm64"},
		"5.10":       {"linux-image-5.10.0-46-cloud-amd64", "linux-image-5.10.0-46-cloud-amd64-unsigned"},

		"6.12-builtin": {"linux-source-6.12"},
	}
	for _, k := range kernelPackages {
		var got []string
		for _, p := range packages {
			if k.pattern.MatchString(p) {
				got = append(got, p)
			}
		}
		if !slices.Equal(got, want[k.name]) {
			t.Errorf("%s: %v", k.name, got)
		}
	}
}

func TestLostOptions(t *testing.T) {
	const fragment = "# a comment\nCONFIG_NET=y\nCONFIG_BRIDGE=y\nCONFIG_NF_NAT=y\nCONFIG_NR_CPUS=8\n"
	const config = "CONFIG_NET=y\nCONFIG_BRIDGE=m\n# CONFIG_NF_NAT is not set\nCONFIG_NR_CPUS=8\n"
	if got, want := lostOptions(fragment, config), []string{"CONFIG_BRIDGE=y", "CONFIG_NF_NAT=y"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := lostOptions(config, config); len(got) != 0 {
		t.Errorf("got %q", got)
	}
}

func TestOtherParts(t *testing.T) {
	want := []string{"linux-modules-7.3.4+deb13-cloud-amd64", "linux-base-7.3.4+deb13-cloud-amd64"}
	for _, p := range []string{"linux-binary-7.3.4+deb13-cloud-amd64", "linux-binary-unsigned-7.3.4+deb13-cloud-amd64"} {
		if got := otherParts(p); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", p, got, want)
		}
	}
	if got := otherParts("linux-image-6.18.15+deb13-cloud-amd64"); got != nil {
		t.Errorf("a package with modules: got %q", got)
	}
}

// Both ways in which packages hold a kernel.
func TestOpenKernel(t *testing.T) {
	for _, image := range []string{"boot/vmlinuz-6.18.15+deb13-cloud-amd64", "usr/lib/modules/6.18.15+deb13-cloud-amd64/vmlinuz"} {
		dir := t.TempDir()
		for _, f := range []string{image, "usr/lib/modules/6.18.15+deb13-cloud-amd64/modules.order"} {
			if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(f)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		k, err := openKernel(&kernelSource{name: "6.18"}, "p", "1", dir)
		if err != nil {
			t.Errorf("%s: %v", image, err)
			continue
		}
		if k.Release != "6.18.15+deb13-cloud-amd64" || k.Image() != filepath.Join(dir, image) {
			t.Errorf("%s: release %q, image %s", image, k.Release, k.Image())
		}
	}
	if k, err := openKernel(&kernelSource{name: "6.18"}, "p", "1", t.TempDir()); err == nil {
		t.Errorf("an empty directory: %+v", k)
	}
}

func TestSuiteSources(t *testing.T) {
	suites := []suite{{name: "new"}, {name: "old-security", security: true, ended: true}}
	for _, c := range []struct{ name, targets, want string }{
		{"fetched",
			"http://other.test/debian/|Other|Other\ncdrom:[x]/||\nhttp://a.test/debian/|Debian|Debian\nhttp://b.test/sec/|Debian|Debian-Security\n",
			"deb [arch=amd64 target=Packages lang=none signed-by=/k] http://a.test/debian/ new main\n" +
				"deb [arch=amd64 target=Packages lang=none signed-by=/k check-valid-until=no] http://b.test/sec/ old-security main\n"},
		{"not fetched yet",
			"http://other.test/repo/||\nhttp://a.test/debian/||\nhttp://a.test/debian-security/||\n",
			"deb [arch=amd64 target=Packages lang=none signed-by=/k] http://a.test/debian/ new main\n" +
				"deb [arch=amd64 target=Packages lang=none signed-by=/k check-valid-until=no] http://a.test/debian-security/ old-security main\n"},
		{"no security archive",
			"http://a.test/debian/|Debian|Debian\n",
			"deb [arch=amd64 target=Packages lang=none signed-by=/k] http://a.test/debian/ new main\n"},
	} {
		if got, err := suiteSources("amd64", suites, c.targets, "/k"); err != nil || got != c.want {
			t.Errorf("%s: %v, got\n%s", c.name, err, got)
		}
	}
	got, err := suiteSources("arm64", suites[:1], "http://a.test/debian/|Debian|Debian\n", "")
	if want := "deb [arch=arm64 target=Packages lang=none] http://a.test/debian/ new main\n"; err != nil || got != want {
		t.Errorf("no keyring: %v, got\n%s", err, got)
	}
	if got, err := suiteSources("amd64", suites, "http://other.test/debian/|Other|Other\n", ""); err == nil || !strings.Contains(err.Error(), "add a suite of Debian's") {
		t.Errorf("no archive: %v, got\n%s", err, got)
	}
}

func TestMergedPath(t *testing.T) {
	for in, want := range map[string]string{
		"/bin/x": "/usr/bin/x", "/lib64/y": "/usr/lib64/y", "/usr/bin/x": "/usr/bin/x", "/binary": "/binary", "/e2e/../sbin/z": "/usr/sbin/z",
	} {
		if got := mergedPath(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestConsoleTail(t *testing.T) {
	var c tail
	for range 5000 {
		c.Write([]byte("a line of the console\r\n"))
	}
	c.Write([]byte("Kernel panic - not "))
	c.Write([]byte("syncing: \x1b[31mtest\n"))
	if !c.panicked() {
		t.Error("the panic was not seen")
	}
	s := c.String()
	if strings.ContainsAny(s, "\r\x1b") || strings.Count(s, "\n") > tailLines || !strings.HasSuffix(s, "test") {
		t.Errorf("got %q", s)
	}
}

func TestSimulated(t *testing.T) {
	const out = `Reading package lists...
The following NEW packages will be installed:
  kmod libc6
Inst libc6 (2.36-9+deb12u13 Debian:12.12/oldstable, Debian-Security:12/oldstable-security [arm64]) [kmod:arm64 ]
Inst kmod (30+20221128-1 Debian:12.12/oldstable [arm64])
Conf libc6 (2.36-9+deb12u13 Debian:12.12/oldstable [arm64])
`
	if got, want := simulated(out), []string{"kmod=30+20221128-1", "libc6=2.36-9+deb12u13"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A link of another root leads to a file of that root, never to one of the machine.
func TestRootFind(t *testing.T) {
	r := &root{dir: t.TempDir()}
	for _, d := range []string{"bin", "sbin", "usr/sbin"} {
		if err := os.MkdirAll(filepath.Join(r.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(r.dir, "bin/ip"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"sbin/ip": "/bin/ip", "usr/sbin/rip": "../../sbin/ip", "sbin/sh": "/bin/sh", "sbin/loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(r.dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for program, want := range map[string]string{"ip": "/bin/ip", "rip": "/bin/ip", "sh": "", "loop": ""} {
		if got, err := r.find(program); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", program, got, err, want)
		}
	}
}
