package testenv

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// builtinConfig configures a kernel whose netfilter is all built in.
//
//go:embed builtin.config
var builtinConfig string

// build is what is added to the version of a kernel that is built here; "" for others.
func (s *kernelSource) build() string {
	if s.config == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(s.config))
	return "+" + hex.EncodeToString(sum[:4])
}

// buildPackage is fetchPackage for source, which it builds: as configured, and with nothing else that
// can be left out.
func (s *kernelSource) buildPackage(ctx context.Context, a apt, pkg, version, dir string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fetched, src, tree := filepath.Join(tmp, "package"), filepath.Join(tmp, "source"), filepath.Join(tmp, "tree")
	if err := a.unpack(ctx, []string{pkg + "=" + version}, fetched); err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(fetched, "usr/src/linux-source-*.tar.xz"))
	if err != nil {
		return err
	}
	if len(archives) != 1 {
		return fmt.Errorf("%s has %d archives of source where one was expected", pkg, len(archives))
	}
	if err := os.Mkdir(src, 0o755); err != nil {
		return err
	}
	if _, err := output(ctx, src, "tar", "-x", "--strip-components=1", "-f", archives[0]); err != nil {
		return err
	}

	fragment := filepath.Join(tmp, "config")
	if err := os.WriteFile(fragment, []byte(s.config), 0o644); err != nil {
		return err
	}
	// The same kernel wherever it is built.
	make := func(args ...string) (string, error) {
		return output(ctx, src, "make", append([]string{"-s", "-j" + strconv.Itoa(runtime.NumCPU()), "KCONFIG_ALLCONFIG=" + fragment,
			"KBUILD_BUILD_USER=nftrace", "KBUILD_BUILD_HOST=nftrace", "KBUILD_BUILD_TIMESTAMP=@0"}, args...)...)
	}
	if _, err := make("allnoconfig"); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(src, ".config"))
	if err != nil {
		return err
	}
	if lost := lostOptions(s.config, string(got)); len(lost) > 0 {
		return fmt.Errorf("%s cannot be configured so: %s", pkg, strings.Join(lost, ", "))
	}
	if _, err := make("bzImage", "modules"); err != nil {
		return err
	}

	out, err := make("kernelrelease")
	if err != nil {
		return err
	}
	release := strings.TrimSpace(out)
	if _, err := make("modules_install", "INSTALL_MOD_PATH="+tree, "DEPMOD=true"); err != nil {
		return err
	}
	// There need not be any modules.
	if err := os.MkdirAll(filepath.Join(tree, "lib/modules", release, "kernel"), 0o755); err != nil {
		return err
	}
	for to, from := range map[string]string{"vmlinuz-": "arch/x86/boot/bzImage", "config-": ".config", "System.map-": "System.map"} {
		if err := copyFile(filepath.Join(tree, "boot", to+release), filepath.Join(src, from)); err != nil {
			return err
		}
	}
	return os.Rename(tree, dir)
}

// lostOptions are those of a fragment that the whole configuration does not have so.
func lostOptions(fragment, config string) (lost []string) {
	has := map[string]bool{}
	for line := range strings.Lines(config) {
		has[strings.TrimSpace(line)] = true
	}
	for line := range strings.Lines(fragment) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "CONFIG_") && !has[line] {
			lost = append(lost, line)
		}
	}
	return lost
}
